// What the kernels share that make the gradients of all levels' taps from partial sums, for NVRTC.
//
// Of the macros that the host defines these are used here: KERNEL_SIZE, LEVELS, CHANNELS_LAST.

#include "../common/copies.cuh"

constexpr int TAPS = KERNEL_SIZE * KERNEL_SIZE;

// The parameters of each level: partial sums and how many programs left some, and gradients of bands.
#define SUMS(i) const float *__restrict__ sums##i, int programs##i
#define BANDS(i) float* __restrict__ bands##i
#if LEVELS == 1
#define EACH(of) of(0)
#elif LEVELS == 2
#define EACH(of) of(0), of(1)
#elif LEVELS == 3
#define EACH(of) of(0), of(1), of(2)
#elif LEVELS == 4
#define EACH(of) of(0), of(1), of(2), of(3)
#else
#define EACH(of) of(0), of(1), of(2), of(3), of(4)
#endif

// Declares `sums`, `bands` and `programs`, those of a level.
#define CHOOSE(i) (level == i ? (sums = sums##i, programs = programs##i, bands = bands##i) : nullptr)
#define OF_LEVEL                 \
  const float* sums = sums0;     \
  float* bands = bands0;         \
  int programs = programs0;      \
  EACH(CHOOSE);

// The place of a tap of one of COUNT bands.
template <int COUNT>
DEVICE Offset place(int tap, int band, int channel, int channels) {
  return CHANNELS_LAST ? Offset(tap * COUNT + band) * channels + channel
                       : Offset(channel * COUNT + band) * TAPS + tap;
}
