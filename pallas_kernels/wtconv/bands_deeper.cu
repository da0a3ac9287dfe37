// The levels from the third on of small float32 images, in one launch, for NVRTC.
//
// A block has whole images, and treats one level of them after the other, from the deepest one on: what
// one leaves in memory no other block reads.
//
// The host defines these macros:
//   KERNEL_SIZE      3 or 5
//   LEVELS           2 or 3
//   VECTOR           as `bands_level.cuh` has it
//   ACROSS0, IMAGES0, STAGES0    its constants of the third level
//   ACROSS1, IMAGES1, STAGES1    those of the fourth
//   ACROSS2, IMAGES2, STAGES2    those of the fifth, which is made of the means for the fourth

#define BLOCK_WARPS 8
#define BASE 0
#define LOWS 0
#define BOXED 0

namespace third {
#define ACROSS ACROSS0
#define IMAGES IMAGES0
#define STAGES STAGES0
#define BELOW 1
#define HALVED 0
#include "bands_level.cuh"
}  // namespace third

#undef ACROSS
#undef IMAGES
#undef STAGES
#undef BELOW
namespace fourth {
#define ACROSS ACROSS1
#define IMAGES IMAGES1
#define STAGES STAGES1
#define BELOW (LEVELS == 3)
#include "bands_level.cuh"
}  // namespace fourth

#if LEVELS == 3
#undef ACROSS
#undef IMAGES
#undef STAGES
#undef BELOW
#undef HALVED
namespace fifth {
#define ACROSS ACROSS2
#define IMAGES IMAGES2
#define STAGES STAGES2
#define BELOW 0
#define HALVED 1
#include "bands_level.cuh"
}  // namespace fifth
#endif

// Ends a level: what it has written is read by the next, which writes to the same shared memory.
__device__ __forceinline__ void end() {
  third::wait<0>();
  __syncthreads();
}

// Blocks of a number are those of all chunks of 32 channels, and have their share of the images with the
// other `programs`. `x` are the means that the third level treats, of these sizes, `halves` those of
// their squares; `bands [k, k, 4, C]` are taps. `y` is what is added to the squares of the second
// level; `y1` and `y2` are what the fourth and the fifth make.
extern "C" __global__ void __launch_bounds__(32 * BLOCK_WARPS, 1)
bands_deeper(const float* __restrict__ x, const float* __restrict__ halves,
             const float* __restrict__ bands0, const float* __restrict__ bands1,
#if LEVELS == 3
             const float* __restrict__ bands2,
#endif
             int count, int channels, int high, int wide, int programs, int transpose, float* y, float* y1
#if LEVELS == 3
             ,
             float* y2
#endif
) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const int chunks = (channels + third::CHUNK - 1) / third::CHUNK;
  const int chunk = int(blockIdx.x) % chunks * third::CHUNK, number = int(blockIdx.x) / chunks;
  const int first = int((long long)count * number / programs);
  const int own = int((long long)count * (number + 1) / programs) - first;
  const int half_high = (high + 1) / 2, half_wide = (wide + 1) / 2;
  const long long pixels = (long long)first * high * wide * channels;
  const long long half_pixels = (long long)first * half_high * half_wide * channels;
  x += pixels, y += pixels, halves += half_pixels, y1 += half_pixels;
#if LEVELS == 3
  y2 += (long long)first * ((half_high + 1) / 2) * ((half_wide + 1) / 2) * channels;
  fifth::treat(shared, halves, nullptr, bands2, nullptr, nullptr, nullptr, own, channels, half_high,
               half_wide, {chunk, 0, 1}, transpose, y2, nullptr, nullptr);
  end();
  fourth::treat(shared, halves, nullptr, bands1, y2, nullptr, nullptr, own, channels, half_high,
                half_wide, {chunk, 0, 1}, transpose, y1, nullptr, nullptr);
#else
  fourth::treat(shared, halves, nullptr, bands1, nullptr, nullptr, nullptr, own, channels, half_high,
                half_wide, {chunk, 0, 1}, transpose, y1, nullptr, nullptr);
#endif
  end();
  third::treat(shared, x, nullptr, bands0, y1, nullptr, nullptr, own, channels, high, wide,
               {chunk, 0, 1}, transpose, y, nullptr, nullptr);
}
