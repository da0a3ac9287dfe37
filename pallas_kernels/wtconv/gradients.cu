// The gradients of the taps of all levels from the partial sums that `bands_weights` and
// `folded_weights` leave, or of the kernels and scales whose products the taps are, for NVRTC.
//
// A block has all taps of a band of some channels, a thread one of them. Its partial sums are added
// in their order, and products over the taps likewise, so results are bitwise reproducible.
//
// The host defines these macros, beside that of `levels.cuh`:
//   KERNEL_SIZE      3, 5 or 7
//   WIDTH            channels of a block; of 8 a row of sums has 32 bytes
//   CHANNELS_LAST    whether taps are [k, k, bands, C], 0: they are [C, bands, k, k]
//   SCALED           whether the gradients are those of kernels, scales and bias, which are arguments
//   DTYPE            of these and their gradients; 0 where there are none

#include "../common/scalars.cuh"
#include "levels.cuh"

#ifndef SHARED
#define SHARED(name) extern __shared__ __align__(16) float name[]
#endif

constexpr int TAPS = KERNEL_SIZE * KERNEL_SIZE;
constexpr int THREADS = (WIDTH * (TAPS + 1) + 31) / 32 * 32;

// The parameters of each level: partial sums, the row of an array that they begin in, and how many
// programs left some; kernels and scales; and the gradients.
#define SUMS(i) const float *__restrict__ sums##i, int row##i, int programs##i
#if SCALED
#define GIVEN(i) const Scalar *__restrict__ kernels##i, const Scalar *__restrict__ factors##i
#define MADE(i) Scalar *__restrict__ bands##i, Scalar *__restrict__ scales##i
#define CHOOSE(i)                                                                       \
  (level == i ? (sums = sums##i, row = row##i, programs = programs##i, scales = scales##i, \
                 factors = factors##i, kernels = kernels##i, bands = bands##i)          \
              : nullptr)
#else
#define MADE(i) Scalar* __restrict__ bands##i
#define CHOOSE(i) \
  (level == i ? (sums = sums##i, row = row##i, programs = programs##i, bands = bands##i) : nullptr)
#endif

// Sums of the first level are `[programs, 5 * TAPS + 1, C]`, of others `[programs, 4 * TAPS, C]`: of
// each tap the bands, then the base's taps, then the bias.
extern "C" __global__ void __launch_bounds__(THREADS)
gradients(int channels, EACH(SUMS),
#if SCALED
          const Scalar* __restrict__ base_kernels, const Scalar* __restrict__ base_factors,
          EACH(GIVEN), const Scalar* __restrict__ offsets, Scalar* __restrict__ base_scales,
#endif
          Scalar* __restrict__ base, Scalar* __restrict__ bias, EACH(MADE)) {
  const int chunks = (channels + WIDTH - 1) / WIDTH, group = int(blockIdx.x) / chunks;
  const int lane = int(threadIdx.x) % WIDTH, tap = int(threadIdx.x) / WIDTH;
  const int channel = int(blockIdx.x) % chunks * WIDTH + lane;
  const bool based = group == 0;
  const int level = based ? 0 : (group - 1) / 4, band = based ? 0 : (group - 1) % 4;
  const int rows = based ? 1 : 4, count = level ? 4 * TAPS : 5 * TAPS + 1;
  const int number_of_sums = based ? 4 * TAPS + tap : 4 * tap + band;
  const Offset line = Offset(channel) * rows + band;
  const bool there = channel < channels && tap < TAPS + based;
  const float* sums = sums0;
  Scalar* bands = bands0;
  int row = row0, programs = programs0;
#if SCALED
  const Scalar *kernels = kernels0, *factors = factors0;
  Scalar* scales = scales0;
#endif
  EACH(CHOOSE);
#if SCALED
  if (based) kernels = base_kernels, factors = base_factors, scales = base_scales;
#endif
  float sum = 0.0f;
  if (there) {
    const float* from = sums + (Offset(row) + number_of_sums) * channels + channel;
#pragma unroll 8
    for (int i = 0; i < programs; i++) sum += from[Offset(i) * count * channels];
    // A coefficient is half its sum of pixels, of x and of dy; a level below it, its pixels are means,
    // half of what they stand for.
    if (!based) sum *= 0.25f * float(1 << 2 * level);
  }
#if SCALED
  SHARED(products);
  if (there) {
    // The bias is multiplied by the scales of the base too.
    float kernel = 0.0f;
    if (tap < TAPS) kernel = number(kernels[line * TAPS + tap]);
    else if (offsets != nullptr) kernel = number(offsets[channel]);
    products[tap * WIDTH + lane] = kernel * sum;
    sum *= number(factors[line]);
  }
  __syncthreads();
  if (there && tap == 0) {
    float total = 0.0f;
    for (int i = 0; i < TAPS + based; i++) total += products[i * WIDTH + lane];
    scales[line] = scalar(total);
  }
#endif
  if (!there) return;
  const Offset place =
      CHANNELS_LAST ? Offset(tap * rows + band) * channels + channel : line * TAPS + tap;
  if (based && tap == TAPS) bias[channel] = scalar(sum);
  else (based ? base : bands)[place] = scalar(sum);
}
