// What `wtconv.cu` uses of the CUDA language, for a C++ compiler: a block's threads are fibers.
//
// A barrier hands over to the next thread, so the order of threads between two barriers can be
// chosen: forward, backward or shuffled. Shared memory is of exactly the size of the launch and
// full of NaNs, so that AddressSanitizer finds what lies beyond it, and tests what is not written.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

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

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  unsigned thread;
  bool done;
};

inline ucontext_t scheduler;
inline Fiber* current;
inline Index block_index;
inline float* shared;
inline void (*kernel)(void**);
inline void** arguments;

inline void start() {
  kernel(arguments);
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Runs a grid; returns 0, or 1 where not all threads of a block reached a barrier.
inline int launch(void (*function)(void**), void** values, unsigned grid, unsigned threads,
                  unsigned bytes, unsigned order) {
  kernel = function;
  arguments = values;
  std::mt19937 random(order);
  std::vector<Fiber> fibers(threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(128 << 10);
  int diverged = 0;
  for (unsigned block = 0; block < grid; block++) {
    block_index.x = block;
    std::vector<float> memory(bytes / sizeof(float) + 4, std::numeric_limits<float>::quiet_NaN());
    // As aligned as on a GPU.
    std::uintptr_t at = reinterpret_cast<std::uintptr_t>(memory.data());
    float* first = memory.data() + (16 - at % 16) % 16 / sizeof(float);
    std::vector<Fiber*> live;
    shared = first;
    for (unsigned t = 0; t < threads; t++) {
      Fiber& fiber = fibers[t];
      fiber.thread = t;
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, start, 0);
      live.push_back(&fiber);
    }
    while (!live.empty()) {
      if (order == 1) std::reverse(live.begin(), live.end());
      if (order > 1) std::shuffle(live.begin(), live.end(), random);
      unsigned done = 0;
      for (Fiber* fiber : live) {
        current = fiber;
        swapcontext(&scheduler, &fiber->context);
        done += fiber->done;
      }
      if (order == 1) std::reverse(live.begin(), live.end());
      if (done != 0 && done != live.size()) diverged = 1;
      live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* f) { return f->done; }),
                 live.end());
    }
  }
  return diverged;
}

}  // namespace cuda_on_cpu

#define threadIdx (Index{cuda_on_cpu::current->thread})
#define blockIdx (cuda_on_cpu::block_index)

inline void __syncthreads() {
  swapcontext(&cuda_on_cpu::current->context, &cuda_on_cpu::scheduler);
}

// float16 by the definition of the format, rounded to nearest even.
inline float half_number(unsigned short bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(float(fraction), -24);
  } else {
    value = std::ldexp(float(fraction + 1024), exponent - 25);
  }
  return bits >> 15 ? -value : value;
}

inline unsigned short half_bits(float value) {
  const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = std::max(exponent - 11, -24);
  const int units = int(std::nearbyint(std::ldexp(size, -exponent)));
  if (exponent == -24) return sign | units;
  // A rounding up to 2048 carries into the exponent by itself.
  return sign | (((exponent + 25) << 10) + units - 1024);
}
