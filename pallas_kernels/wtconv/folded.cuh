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
// A warp treats a group of GROUP channels, whose pixels are neighbours in shared memory for it.
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

// Each channel's Toeplitz matrices: a register holds rows 2t and 2t + 1 of column g, lane 4g + t.
typedef unsigned Matrix[GROUP][REACHED * PARTS];

// The words of a warp's channels, as one access to memory.
struct alignas(4 * GROUP) Words {
  unsigned at[GROUP];
};

// Taps are C biases, in float32, then `[levels, REACHED, 2 * KERNEL_SIZE, 2, 2, C, 2]`: pair of rows
// and column of the input, column and row of the output, row of the input. They move with each second
// column of the output.
DEVICE void load_taps(const unsigned* __restrict__ taps, int level, int first, int channels,
                      Matrix& matrix) {
  constexpr int COLUMNS = 2 * KERNEL_SIZE;
  const int lane = threadIdx.x % 32, place = lane / 4 % 4, column = lane % 4 - lane / 16 * 2;
#pragma unroll
  for (int i = 0; i < REACHED * PARTS; i++) {
    const int at = column + 4 * (i % PARTS);
    const int square = ((level * REACHED + i / PARTS) * COLUMNS + at) * 4 + place;
    const unsigned* from = taps + Offset(1 + square) * channels + first;
    const bool there = at >= 0 && at < COLUMNS;
    Words found = {};
    if (VECTOR % GROUP == 0) {
      if (there && first < channels) found = *reinterpret_cast<const Words*>(from);
    } else {
#pragma unroll
      for (int c = 0; c < GROUP; c++)
        if (there && first + c < channels) found.at[c] = from[c];
    }
#pragma unroll
    for (int c = 0; c < GROUP; c++) matrix[c][i] = found.at[c];
  }
}

// The biases of a warp's channels, which the first level adds.
DEVICE void load_biases(const unsigned* __restrict__ taps, int level, int first, int channels,
                        float (&biases)[GROUP]) {
#pragma unroll
  for (int c = 0; c < GROUP; c++)
    biases[c] = level == 0 && first + c < channels ? __uint_as_float(taps[first + c]) : 0.0f;
}
