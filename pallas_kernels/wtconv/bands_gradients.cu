// The gradients of the taps of all levels from the partial sums that `bands_weights` leaves, for NVRTC.
//
// A warp has a tap of 32 channels of a level. Its partial sums are added in their order, so results
// are bitwise reproducible.
//
// The host defines these macros:
//   KERNEL_SIZE      3 or 5
//   LEVELS           the number of levels, at most 5
//   WARPS            warps of a block
//   CHANNELS_LAST    whether taps are [k, k, bands, C], 0: they are [C, bands, k, k]

#include "gradients.cuh"

// Blocks of a level and of 32 channels.
constexpr int BLOCKS = (5 * TAPS + 1 + WARPS - 1) / WARPS;

// Sums of the first level are `[programs, 5 * TAPS + 1, C]`, of others `[programs, 4 * TAPS, C]`.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
bands_gradients(int channels, EACH(SUMS), float* __restrict__ base, float* __restrict__ bias,
                EACH(BANDS)) {
  const int chunks = (channels + 31) / 32;
  const int level = int(blockIdx.x) / (BLOCKS * chunks);
  const int channel = int(blockIdx.x) % chunks * 32 + int(threadIdx.x) % 32;
  const int number = int(blockIdx.x) / chunks % BLOCKS * WARPS + int(threadIdx.x) / 32;
  OF_LEVEL
  const int count = level ? 4 * TAPS : 5 * TAPS + 1;
  if (channel >= channels || number >= count) return;
  const float* from = sums + Offset(number) * channels + channel;
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
