// What the CUDA sources use of the language, for a C++ compiler: a block's threads are fibers.
//
// Shared memory is of exactly the size of the launch and full of NaNs, so that AddressSanitizer
// finds what lies beyond it, and tests what is not written.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
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

struct Index {
  unsigned x;
};

namespace cuda_on_cpu {

inline Index block_index;
inline float* shared;

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
    std::vector<float> memory(bytes / sizeof(float) + 4, std::numeric_limits<float>::quiet_NaN());
    // As aligned as on a GPU.
    std::uintptr_t at = reinterpret_cast<std::uintptr_t>(memory.data());
    shared = memory.data() + (16 - at % 16) % 16 / sizeof(float);
    together &= block.run();
  }
  return !together;
}

}  // namespace cuda_on_cpu

#define threadIdx (Index{on_cpu::current->thread})
#define blockIdx (cuda_on_cpu::block_index)

inline void __syncthreads() { on_cpu::barrier(); }
