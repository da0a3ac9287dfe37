// What the CUDA sources use of the language, for a C++ compiler: a block's threads are fibers.
//
// What no kernel changes is in runtime.cpp, as the compiler takes as long for it as for a kernel.
//
// Shared memory is of exactly the size of the launch and full of NaNs, so that AddressSanitizer
// finds what lies beyond it, and tests what is not written.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fibers.h"
#include "half.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define SHARED(name) float* const name = cuda_on_cpu::shared

using std::max;
using std::min;

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = low | std::uint64_t(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned which = selector >> 4 * i & 7;
    result |= unsigned(bytes >> 8 * which & 255) << 8 * i;
  }
  return result;
}

struct Index {
  unsigned x;
};

namespace cuda_on_cpu {

inline Index block_index, grid;
inline float* shared;

// A misused instruction; the launch fails.
inline bool misused;

// NaN as a number of 32 bits and as two of 16, whichever they are.
constexpr unsigned POISON = 0x7fff7fff;

inline float number16(unsigned short bits, bool bfloat16) {
  return bfloat16 ? __uint_as_float(unsigned(bits) << 16) : half_number(bits);
}

inline unsigned short bits16(float value, bool bfloat16) {
  if (!bfloat16) return half_bits(value);
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline unsigned packed(float low, float high, bool bfloat16) {
  return bits16(low, bfloat16) | unsigned(bits16(high, bfloat16)) << 16;
}

// The registers that the lanes of a warp give to a product. Two of each: a lane may give to the next
// product while another still reads those of this one.
struct Warp {
  on_cpu::Meeting meeting, together;
  unsigned a[2][32][4], b[2][32][2];
  const unsigned char* rows[2][32];
};
extern Warp* warps;

// mma.sync m16n8k8, or with HALVES = 2 m16n8k16, by the maps of registers in PTX's manual.
template <int HALVES>
inline void multiply(float (&d)[4], const unsigned (&a)[2 * HALVES], const unsigned (&b)[HALVES],
                     const float (&c)[4], bool bfloat16) {
  const unsigned lane = on_cpu::current->thread % 32;
  Warp& warp = warps[on_cpu::current->thread / 32];
  const unsigned turn = warp.meeting.held % 2;
  std::copy_n(a, 2 * HALVES, warp.a[turn][lane]);
  std::copy_n(b, HALVES, warp.b[turn][lane]);
  on_cpu::meet(warp.meeting, 32);
  float sums[4];
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8 * HALVES; k++) {
      const unsigned one = warp.a[turn][row * 4 + k % 8 / 2][i / 2 + k / 8 * 2];
      const unsigned other = warp.b[turn][column * 4 + k % 8 / 2][k / 8];
      sum += double(number16(k % 2 ? one >> 16 : one, bfloat16)) *
             number16(k % 2 ? other >> 16 : other, bfloat16);
    }
    sums[i] = float(sum);
  }
  std::copy_n(sums, 4, d);
}

// ldmatrix: COUNT matrices of 8 x 8 numbers, each row of which is where another lane says.
template <int COUNT>
inline void matrices(unsigned (&d)[COUNT], const void* row) {
  const unsigned lane = on_cpu::current->thread % 32;
  Warp& warp = warps[on_cpu::current->thread / 32];
  const unsigned turn = warp.meeting.held % 2;
  misused |= reinterpret_cast<std::uintptr_t>(row) % 16 != 0;
  warp.rows[turn][lane] = static_cast<const unsigned char*>(row);
  on_cpu::meet(warp.meeting, 32);
  for (int i = 0; i < COUNT; i++)
    std::memcpy(d + i, warp.rows[turn][8 * i + lane / 4] + lane % 4 * 4, 4);
}

// Copies that a thread has started, in groups, the last of which is open. They arrive no earlier
// than they are waited for.
void copy(void* to, const void* from, int bytes, bool inside);
void commit();
void wait(unsigned pending);

// An array [images, rows, columns, channels], and the boxes that are copied of it.
struct TensorMap {
  unsigned char* array;
  long long strides[4];  // Channels first.
  int sizes[4], box[4];
  int bytes;             // Of an element.
};

struct Place {
  int channel, column, row, image;
};

// Barriers in shared memory; copies of boxes that a barrier was told of arrive when it is waited for.
void make(const void* barrier, unsigned arrivals);
void arrive(const void* barrier);
void expect(const void* barrier, unsigned bytes);
void load_box(void* to, const TensorMap& map, const void* barrier, const Place& place);
void wait_for(const void* barrier, unsigned phase);

// Copies of boxes to arrays: they read shared memory no earlier than is waited for.
void store_box(const TensorMap& map, const Place& place, const void* from);
void stored(unsigned pending);

// Calls a kernel with arguments of its own types, each behind a pointer.
template <typename... Types, std::size_t... I>
inline void call(void (*kernel)(Types...), void** values, std::index_sequence<I...>) {
  kernel(*static_cast<Types*>(values[I])...);
}

template <typename... Types>
inline void call(void (*kernel)(Types...), void** values) {
  call(kernel, values, std::index_sequence_for<Types...>());
}

template <typename... Types>
constexpr unsigned parameters(void (*)(Types...)) {
  return sizeof...(Types);
}

// Runs a grid; returns 0, or 1 where not all threads of a block reached a barrier, or misused one.
int launch(void (*function)(void**), void** values, unsigned blocks, unsigned threads,
           unsigned bytes, unsigned order);

}  // namespace cuda_on_cpu

#define threadIdx (Index{on_cpu::current->thread})
#define blockIdx (cuda_on_cpu::block_index)
#define gridDim (cuda_on_cpu::grid)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Reads what nobody is to read again soon.
template <typename Type>
inline Type __ldcs(const Type* from) {
  return *from;
}

inline void __syncthreads() { on_cpu::barrier(); }
inline void __syncwarp() {
  on_cpu::meet(cuda_on_cpu::warps[on_cpu::current->thread / 32].together, 32);
}
