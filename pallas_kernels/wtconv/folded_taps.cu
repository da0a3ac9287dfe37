// The taps of each level's one convolution from the kernels of base and bands, for NVRTC: their scales,
// and the fold of `folding.py`.
//
// The host defines these macros, beside that of `levels.cuh`:
//   BFLOAT16         1, or 0 for float16: the dtype of the taps
//   WIDE             whether kernels, scales and bias are float32, 0: they are of the taps' dtype
//   KERNEL_SIZE      3, 5 or 7

#include "../common/tensor_cores.cuh"
#include "levels.cuh"

constexpr int K = KERNEL_SIZE, TAPS = K * K, COLUMNS = 2 * K, R = K / 2;

#if WIDE
typedef float Number;
DEVICE float number(Number v) { return v; }
#else
typedef Scalar Number;
DEVICE float number(Number v) { return number_of(v); }
#endif

#define BANDS(i) const Number *__restrict__ bands##i, const Number *__restrict__ scales##i
#define CHOOSE(i) (level == i ? (bands = bands##i, scales = scales##i) : nullptr)

// A thread has a channel, a pair of rows and a column of the input, and makes the words of a square of
// the output: `[levels, K, 2 * K, 2, 2, C]`, the upper row of the input in the lower half. Before them
// are the biases, zeros where `bias` is null. Kernels are `[C, 1, K, K]` of the base and `[C, 4, K, K]`
// of each level, scales `[C]` and `[C, 4]`; where these are null kernels are taken as they are.
extern "C" __global__ void __launch_bounds__(256)
folded_taps(const Number* __restrict__ base, const Number* __restrict__ base_scales, EACH(BANDS),
            const Number* __restrict__ bias, int channels, int flipped,
            unsigned* __restrict__ folded) {
  const int at = int(blockIdx.x) * 256 + int(threadIdx.x), channel = at % channels;
  const int j = at / channels % COLUMNS, pair = at / channels / COLUMNS % K;
  const int level = at / channels / (COLUMNS * K);
  if (level >= LEVELS) return;
  const Number *bands = bands0, *scales = scales0;
  EACH(CHOOSE);
  const auto place = [flipped](int tap) { return flipped ? TAPS - 1 - tap : tap; };
  const auto scale = [](const Number* of, Offset row) { return of ? number(of[row]) : 1.0f; };
  const float base_scale = level ? 0.0f : scale(base_scales, channel);
  if (at < channels) folded[at] = __float_as_uint(bias ? base_scale * number(bias[at]) : 0.0f);
  float values[4];
#pragma unroll
  for (int band = 0; band < 4; band++) {
    const Offset row = Offset(channel) * 4 + band;
    values[band] = 0.25f * (scale(scales, row) * number(bands[row * TAPS + place(pair * K + j / 2)]));
  }
  unsigned* to = folded + (1 + Offset(at / channels) * 4) * channels + channel;
#pragma unroll
  for (int word = 0; word < 4; word++) {
    const int column = word / 2, row = word % 2;
    float halves[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // The first bit of a band is the sign of rows, the second that of columns.
      const int rows = row ^ half, columns = column ^ j % 2;
      float sum = 0.0f;
#pragma unroll
      for (int band = 0; band < 4; band++)
        sum += (band & rows) ^ (band >> 1 & columns) ? -values[band] : values[band];
      const int down = 2 * pair + half - row - R, across = j - column - R;
      const bool based = level == 0 && 0 <= down && down < K && 0 <= across && across < K;
      if (based) sum += base_scale * number(base[Offset(channel) * TAPS + place(down * K + across)]);
      halves[half] = sum;
    }
    to[word * channels] = packed(halves[0], halves[1]);
  }
}
