// What the kernels of the folded wavelet convolution share, for NVRTC.
//
// The analysis of one level, the convolution of its four bands, their synthesis, and the base
// convolution are linear, and repeat every two pixels: together they are one convolution of 2k x 2k
// taps for each of the four places in a square of two rows and columns. The host folds the taps.
// Bands are never computed. A deeper level is the same on the means of the squares of the level
// above, and what it makes is added to all pixels of a square.
//
// A channel's convolution is a product of matrices. M: 16 blocks of four columns of one pair of
// rows. K: a pair of rows of the pixels that such a block reads. N: its four columns of a pair of
// rows of the output. So the taps are a Toeplitz matrix.
//
// Pixels are kept in shared memory as groups of GROUP channels, one group after the other, or as TMA
// lays boxes: a warp treats a group, and its loads are neighbours.
//
// Arithmetic is that of the tensor cores: products of 16-bit numbers, summed in float32. A pixel
// that is Inf or NaN is multiplied by zeros of the Toeplitz matrix too: it makes NaN of the block's
// four columns and pair of rows wherever its matrix reaches.
//
// The host defines these macros:
//   BFLOAT16         1 bfloat16, 0 float16
//   KERNEL_SIZE      3, 5 or 7
//   VECTOR           channels that one access to memory takes, a divisor of C
//   GROUP            channels of a warp, 4 or 2
//   GROUPS           warps of a block
//   RESIDENT         blocks of a multiprocessor, for which registers are to suffice

#include "../common/tensor_cores.cuh"

constexpr int R = KERNEL_SIZE / 2;               // Pairs of rows that a pair reads to each side.
constexpr int REACHED = KERNEL_SIZE;             // Pairs of the output that a pair is multiplied for.
constexpr int HALO = 2 * R;                      // Columns that a block reads to each side.
constexpr int PARTS = 1 + R;                     // Times four columns that a block reads.
constexpr int TOGETHER = GROUP * GROUPS;         // Channels of a thread block.
constexpr int THREADS = 32 * GROUPS;

// Bytes from one group to the next: 16 more than a multiple of 128, so that the groups of a pixel
// are in different banks.
DEVICE constexpr int group_bytes(int pixels) { return (2 * GROUP * pixels + 127) / 128 * 128 + 16; }

// The channels of a group of one pixel, two to a word.
struct alignas(2 * GROUP) Channels {
  unsigned words[GROUP / 2];
};

DEVICE Channels channels_at(const unsigned char* from) {
  return *reinterpret_cast<const Channels*>(from);
}

// Two pixels' values of one channel, the first one in the lower half.
DEVICE unsigned of_channel(int channel, const Channels& one, const Channels& other) {
  return __byte_perm(one.words[channel / 2], other.words[channel / 2],
                     channel % 2 ? 0x7632 : 0x5410);
}

// Each channel's Toeplitz matrices: a register holds rows 2t and 2t + 1 of column g, lane 4g + t.
typedef unsigned Matrix[GROUP][REACHED * PARTS];

// Taps are `[levels, C, REACHED, 2 * KERNEL_SIZE, 2, 2, 2]`: pair of rows and column of the input,
// column and row of the output, row of the input. They move with each second column of the output.
DEVICE void load_taps(const unsigned* __restrict__ taps, int level, int first, int channels,
                      Matrix& matrix) {
  constexpr int COLUMNS = 2 * KERNEL_SIZE;
  const int lane = threadIdx.x % 32, place = lane / 4 % 4, column = lane % 4 - lane / 16 * 2;
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
    const unsigned* from =
        taps + (Offset(level) * channels + first + c) * REACHED * COLUMNS * 4 + 4 * column + place;
#pragma unroll
    for (int i = 0; i < REACHED * PARTS; i++) {
      const int at = column + 4 * (i % PARTS);
      const bool there = first + c < channels && at >= 0 && at < COLUMNS;
      matrix[c][i] = there ? from[4 * (i / PARTS * COLUMNS + 4 * (i % PARTS))] : 0;
    }
  }
}


// Multiplies a pair of rows of a channel by a Toeplitz matrix, for 16 blocks of the output.
DEVICE void multiply_parts(float (&sums)[4], const unsigned (&values)[PARTS][2], const unsigned* b,
                           const float (&before)[4]) {
  multiply16(sums, values[0][0], values[0][1], values[1][0], values[1][1], b[0], b[1], before);
#if KERNEL_SIZE == 5
  multiply8(sums, values[2][0], values[2][1], b[2], sums);
#elif KERNEL_SIZE == 7
  multiply16(sums, values[2][0], values[2][1], values[3][0], values[3][1], b[2], b[3], sums);
#endif
}

// The pixel of register k of sums of all channels, with what is added to it.
DEVICE Channels finished(const float (&sums)[GROUP][4], int k, const float (&offsets)[GROUP],
                         const Channels& under) {
  Channels out;
#pragma unroll
  for (int c = 0; c < GROUP; c += 2) {
    const unsigned word = under.words[c / 2];
    out.words[c / 2] =
        packed(sums[c][k] + (offsets[c] + number_of(Scalar(word))),
               sums[c + 1][k] + (offsets[c + 1] + number_of(Scalar(word >> 16))));
  }
  return out;
}
