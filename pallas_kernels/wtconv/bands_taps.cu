// The taps that `bands_forward` reads, from the kernels of base and bands and their scales, for NVRTC.
//
// The host defines these macros, beside that of `levels.cuh`:
//   KERNEL_SIZE      3 or 5

#include "levels.cuh"

#define DEVICE __device__ __forceinline__

typedef long long Offset;

constexpr int TAPS = KERNEL_SIZE * KERNEL_SIZE;

#define GIVEN(i) const float *__restrict__ kernels##i, const float *__restrict__ scales##i
#define MADE(i) float* __restrict__ taps##i
#define CHOOSE(i) (level == i ? (kernels = kernels##i, scales = scales##i, taps = taps##i) : nullptr)

// A thread has a tap of a band of a channel. Kernels are `[C, 1, K, K]` of the base and `[C, 4, K, K]`
// of each level, scales `[C]` and `[C, 4]`; where these are null kernels are taken as they are. Taps
// are `[K, K, 1, C]` and `[K, K, 4, C]`; `offset` is the scaled bias, zeros where `bias` is null.
extern "C" __global__ void __launch_bounds__(256)
bands_taps(const float* __restrict__ base_kernels, const float* __restrict__ base_scales, EACH(GIVEN),
           const float* __restrict__ bias, int channels, float* __restrict__ base_taps,
           float* __restrict__ offset, EACH(MADE)) {
  const int at = int(blockIdx.x) * 256 + int(threadIdx.x), channel = at % channels;
  // The base's taps come first, then those of all bands of a level, as they follow in its array.
  const int number = at / channels, level = (number - TAPS) / (4 * TAPS);
  const bool based = number < TAPS;
  if (level >= LEVELS) return;
  const float *kernels = kernels0, *scales = scales0;
  float* taps = taps0;
  EACH(CHOOSE);
  if (based) kernels = base_kernels, scales = base_scales, taps = base_taps;
  const int bands = based ? 1 : 4, own = based ? number : (number - TAPS) % (4 * TAPS);
  const Offset row = Offset(channel) * bands + own % bands;
  const float scale = scales ? scales[row] : 1.0f;
  taps[Offset(own) * channels + channel] = scale * kernels[row * TAPS + own / bands];
  if (number == 0) offset[channel] = bias ? scale * bias[channel] : 0.0f;
}
