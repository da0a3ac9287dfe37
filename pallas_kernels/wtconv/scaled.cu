// The kernels of base and bands times their scales, and the gradients of the scales, for NVRTC.
//
// The host defines these macros, beside that of `levels.cuh`:
//   KERNEL_SIZE      3, 5 or 7
//   CHANNELS_LAST    whether kernels are [K, K, bands, C] and scales [bands, C], 0: [C, bands, K, K] and
//                    [C, bands]; products are [K, K, bands, C]
//   DTYPE            of kernels and scales, whose products are float32
//   BACKWARD         whether float32 gradients of the products come in place of kernels, and the
//                    products are of DTYPE: the gradients of kernels

#include "../common/scalars.cuh"
#include "levels.cuh"

constexpr int TAPS = KERNEL_SIZE * KERNEL_SIZE, THREADS = 256;

#if BACKWARD
typedef float Given;
typedef Scalar Made;
DEVICE float given(Given v) { return v; }
DEVICE Made made(float v) { return scalar(v); }
#else
typedef Scalar Given;
typedef float Made;
DEVICE float given(Given v) { return number(v); }
DEVICE Made made(float v) { return v; }
#endif

// Where a tap of a band of a channel is, and the scale of a band.
DEVICE Offset kernel_at(int tap, int band, int bands, int channel, int channels) {
  return CHANNELS_LAST ? Offset(tap * bands + band) * channels + channel
                       : (Offset(channel) * bands + band) * TAPS + tap;
}
DEVICE Offset scale_at(int band, int bands, int channel, int channels) {
  return CHANNELS_LAST ? Offset(band) * channels + channel : Offset(channel) * bands + band;
}

#define FACTORS(i) const Given *__restrict__ kernels##i, const Scalar *__restrict__ scales##i
#define PRODUCTS(i) Made* __restrict__ taps##i
#define CHOOSE(i) (level == i ? (kernels = kernels##i, scales = scales##i, taps = taps##i) : nullptr)

// A thread has a tap of a band of a channel. Where scales are null kernels are taken as they are.
// `offset` is the bias times the scales of the base, zeros where `bias` is null.
extern "C" __global__ void __launch_bounds__(THREADS)
scaled_taps(const Given* __restrict__ base_kernels, const Scalar* __restrict__ base_scales,
            EACH(FACTORS), const Given* __restrict__ bias, int channels,
            Made* __restrict__ base_taps, Made* __restrict__ offset, EACH(PRODUCTS)) {
  const int at = int(blockIdx.x) * THREADS + int(threadIdx.x), channel = at % channels;
  // The base's taps come first, then those of all bands of a level, as they follow in its array.
  const int number_of_row = at / channels, level = (number_of_row - TAPS) / (4 * TAPS);
  const bool based = number_of_row < TAPS;
  if (level >= LEVELS) return;
  const Given* kernels = kernels0;
  const Scalar* scales = scales0;
  Made* taps = taps0;
  EACH(CHOOSE);
  if (based) kernels = base_kernels, scales = base_scales, taps = base_taps;
  const int bands = based ? 1 : 4, own = based ? number_of_row : (number_of_row - TAPS) % (4 * TAPS);
  const int band = own % bands;
  const float scale = scales ? number(scales[scale_at(band, bands, channel, channels)]) : 1.0f;
  const float kernel = given(kernels[kernel_at(own / bands, band, bands, channel, channels)]);
  taps[Offset(own) * channels + channel] = made(scale * kernel);
  if (number_of_row == 0) offset[channel] = made(bias ? scale * given(bias[channel]) : 0.0f);
}
#undef CHOOSE

#define PAIRS(i) const float *__restrict__ gradients##i, const Scalar *__restrict__ kernels##i
#define SUMS(i) Scalar* __restrict__ scales##i
#define CHOOSE(i) \
  (level == i ? (gradients = gradients##i, kernels = kernels##i, scales = scales##i) : nullptr)

// A thread has a band of a channel, and adds over its taps what the gradients of products are times
// the kernels; the bias is multiplied by the scales of the base too. All are channels-last.
extern "C" __global__ void __launch_bounds__(THREADS)
scale_sums(const float* __restrict__ base_gradients, const Scalar* __restrict__ base_kernels,
           EACH(PAIRS), const float* __restrict__ offset_gradients, const Scalar* __restrict__ bias,
           int channels, Scalar* __restrict__ base_scales, EACH(SUMS)) {
  const int at = int(blockIdx.x) * THREADS + int(threadIdx.x), channel = at % channels;
  const int group = at / channels, level = group == 0 ? 0 : (group - 1) / 4;
  if (level >= LEVELS) return;
  const bool based = group == 0;
  const float* gradients = gradients0;
  const Scalar* kernels = kernels0;
  Scalar* scales = scales0;
  EACH(CHOOSE);
  if (based) gradients = base_gradients, kernels = base_kernels, scales = base_scales;
  const int bands = based ? 1 : 4, band = based ? 0 : (group - 1) % 4;
  float sum = based && bias ? offset_gradients[channel] * number(bias[channel]) : 0.0f;
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) {
    const Offset place = Offset(tap * bands + band) * channels + channel;
    sum += gradients[place] * number(kernels[place]);
  }
  scales[Offset(band) * channels + channel] = scalar(sum);
}
