// The gradients of the taps of all levels from the partial sums that `bands_weights` and
// `folded_weights` leave, for NVRTC.
//
// A warp has a tap of 32 channels of a level. Its partial sums are added in their order, so results
// are bitwise reproducible.
//
// The host defines these macros, beside that of `levels.cuh`:
//   KERNEL_SIZE      3, 5 or 7
//   WARPS            warps of a block
//   CHANNELS_LAST    whether taps are [k, k, bands, C], 0: they are [C, bands, k, k]

#include "../common/copies.cuh"
#include "levels.cuh"

constexpr int TAPS = KERNEL_SIZE * KERNEL_SIZE;

// The parameters of each level: partial sums, the row of an array that they begin in, and how many
// programs left some; and gradients of bands.
#define SUMS(i) const float *__restrict__ sums##i, int row##i, int programs##i
#define BANDS(i) float* __restrict__ bands##i

// Declares `sums`, `row`, `bands` and `programs`, those of a level.
#define CHOOSE(i) \
  (level == i ? (sums = sums##i, row = row##i, programs = programs##i, bands = bands##i) : nullptr)
#define OF_LEVEL                        \
  const float* sums = sums0;            \
  float* bands = bands0;                \
  int row = row0, programs = programs0; \
  EACH(CHOOSE);

// The place of a tap of one of COUNT bands.
template <int COUNT>
DEVICE Offset place(int tap, int band, int channel, int channels) {
  return CHANNELS_LAST ? Offset(tap * COUNT + band) * channels + channel
                       : Offset(channel * COUNT + band) * TAPS + tap;
}

// Blocks of a level and of 32 channels.
constexpr int BLOCKS = (5 * TAPS + 1 + WARPS - 1) / WARPS;

// Sums of the first level are `[programs, 5 * TAPS + 1, C]`, of others `[programs, 4 * TAPS, C]`.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
gradients(int channels, EACH(SUMS), float* __restrict__ base, float* __restrict__ bias,
          EACH(BANDS)) {
  const int chunks = (channels + 31) / 32;
  const int level = int(blockIdx.x) / (BLOCKS * chunks);
  const int channel = int(blockIdx.x) % chunks * 32 + int(threadIdx.x) % 32;
  const int number = int(blockIdx.x) / chunks % BLOCKS * WARPS + int(threadIdx.x) / 32;
  OF_LEVEL
  const int count = level ? 4 * TAPS : 5 * TAPS + 1;
  if (channel >= channels || number >= count) return;
  const float* from = sums + (Offset(row) + number) * channels + channel;
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < programs; i++) sum += from[Offset(i) * count * channels];
  if (number < 4 * TAPS) {
    // A coefficient is half its sum of pixels, of x and of dy; a level below it, its pixels are means,
    // half of what they stand for.
    bands[place<4>(number / 4, number % 4, channel, channels)] = 0.25f * float(1 << 2 * level) * sum;
  } else if (number < 5 * TAPS) {
    base[place<1>(number - 4 * TAPS, 0, channel, channels)] = sum;
  } else {
    bias[channel] = sum;
  }
}
