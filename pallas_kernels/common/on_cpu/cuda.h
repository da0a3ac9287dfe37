// What the CUDA sources use of the language, for a C++ compiler: a block's threads are fibers.
//
// Shared memory is of exactly the size of the launch and full of NaNs, so that AddressSanitizer
// finds what lies beyond it, and tests what is not written.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

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

inline Index block_index;
inline float* shared;

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
  on_cpu::Meeting meeting;
  unsigned a[2][32][4], b[2][32][2];
};
inline std::vector<Warp> warps;

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

// Copies that a thread has started, in groups, the last of which is open. They arrive no earlier
// than they are waited for.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;
};
inline std::vector<std::vector<std::vector<Copy>>> copies;

inline void copy(void* to, const void* from, int bytes, bool inside) {
  copies[on_cpu::current->thread].back().push_back({to, from, bytes, inside});
}

inline void commit() { copies[on_cpu::current->thread].emplace_back(); }

inline void wait(unsigned pending) {
  auto& groups = copies[on_cpu::current->thread];
  while (groups.size() - 1 > pending) {
    for (const Copy& one : groups.front()) {
      if (one.inside) {
        std::memcpy(one.to, one.from, one.bytes);
      } else {
        std::memset(one.to, 0, one.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

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

// Runs a grid; returns 0, or 1 where not all threads of a block reached a barrier.
inline int launch(void (*function)(void**), void** values, unsigned grid, unsigned threads,
                  unsigned bytes, unsigned order) {
  on_cpu::Threads block(function, values, threads, order);
  bool together = true;
  for (block_index.x = 0; block_index.x < grid; block_index.x++) {
    std::vector<float> memory(bytes / sizeof(float) + 4, __uint_as_float(POISON));
    // As aligned as on a GPU.
    std::uintptr_t at = reinterpret_cast<std::uintptr_t>(memory.data());
    warps.assign(threads / 32, {});
    copies.assign(threads, std::vector<std::vector<Copy>>(1));
    shared = memory.data() + (16 - at % 16) % 16 / sizeof(float);
    together &= block.run();
  }
  return !together;
}

}  // namespace cuda_on_cpu

#define threadIdx (Index{on_cpu::current->thread})
#define blockIdx (cuda_on_cpu::block_index)

inline void __syncthreads() { on_cpu::barrier(); }
