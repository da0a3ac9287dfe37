// The gradients of the taps of all levels from partial sums of those of the folded taps, for NVRTC:
// the transpose of the fold.
//
// A thread block has a channel of a level, and a thread a folded tap of it. Its partial sums are
// added in their order, so results are bitwise reproducible.
//
// The host defines these macros:
//   KERNEL_SIZE      3, 5 or 7
//   LEVELS           the number of levels, at most 5
//   CHANNELS_LAST    whether taps are [k, k, bands, C], 0: they are [C, bands, k, k]

#include "gradients.cuh"

#ifndef SHARED
#define SHARED(name) extern __shared__ __align__(16) float name[]
#endif

constexpr int COLUMNS = 2 * KERNEL_SIZE, R = KERNEL_SIZE / 2;
constexpr int FOLDED = 16 * TAPS;  // Of a channel; behind them is the bias.
constexpr int THREADS = (FOLDED + 32) / 32 * 32;

// The sum of a folded tap's pixels with the signs of a band: `square` has those of its two columns
// of the input, column and row of the output, row of the input. The first bit of a band is the sign
// of rows, the second that of columns.
DEVICE float banded(const float* square, int band) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const int rows = (i >> 1 ^ i) & 1, columns = (i >> 2 ^ i >> 3) & 1;
    sum += (band & rows) ^ (band >> 1 & columns) ? -square[i] : square[i];
  }
  return 0.25f * sum;
}

// Sums of a level are `[programs, C, FOLDED + 1]`.
extern "C" __global__ void __launch_bounds__(THREADS)
folded_gradients(int channels, EACH(SUMS), float* __restrict__ base, float* __restrict__ bias,
                 EACH(BANDS)) {
  SHARED(shared);
  float* const whole = reinterpret_cast<float*>(shared);
  const int thread = threadIdx.x;
  const int level = int(blockIdx.x) / channels, channel = int(blockIdx.x) % channels;
  OF_LEVEL
  if (thread <= FOLDED) {
    const float* from = sums + Offset(channel) * (FOLDED + 1) + thread;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < programs; i++) sum += from[Offset(i) * channels * (FOLDED + 1)];
    // Means of four pixels a level stand in for their sums.
    whole[thread] = sum * float(1 << 2 * level);
  }
  __syncthreads();
  if (thread < 4 * TAPS)
    bands[place<4>(thread / 4, thread % 4, channel, channels)] =
        banded(whole + thread / 4 * 16, thread % 4);
  if (level > 0) return;
  if (thread < TAPS) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int i = thread / KERNEL_SIZE + k / 2 + R, j = thread % KERNEL_SIZE + k % 2 + R;
      sum += whole[(i / 2 * COLUMNS + j) * 8 + k % 2 * 4 + k / 2 * 2 + i % 2];
    }
    base[place<1>(thread, 0, channel, channels)] = sum;
  }
  if (thread == 0) bias[channel] = whole[FOLDED];
}
