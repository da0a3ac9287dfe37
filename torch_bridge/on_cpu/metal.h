// What `wtconv.metal` uses of the Metal language, for a C++ compiler: a threadgroup's threads are
// fibers.
//
// A barrier hands over to the next thread, so the order of threads between two barriers can be
// chosen: forward, backward or shuffled. Threadgroup memory is full of NaNs when a threadgroup
// starts, so that tests find what is read before it is written.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#define device
#define constant const
#define threadgroup

using uint = unsigned;

template <typename T, int N>
struct Vector;

template <typename T>
struct alignas(2 * sizeof(T)) Vector<T, 2> {
  T x, y;
  Vector(T s) : x(s), y(s) {}
  Vector(T x, T y) : x(x), y(y) {}
};

// As large as four, as in Metal.
template <typename T>
struct alignas(4 * sizeof(T)) Vector<T, 3> {
  T x, y, z;
};

template <typename T>
struct alignas(4 * sizeof(T)) Vector<T, 4> {
  T x, y, z, w;
  Vector(T s) : x(s), y(s), z(s), w(s) {}
  Vector(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
};

using int2 = Vector<int, 2>;
using uint3 = Vector<uint, 3>;
using float4 = Vector<float, 4>;

inline int2 operator+(int2 a, int2 b) { return int2(a.x + b.x, a.y + b.y); }
inline int2 operator-(int2 a, int2 b) { return int2(a.x - b.x, a.y - b.y); }
inline int2 operator*(int2 a, int2 b) { return int2(a.x * b.x, a.y * b.y); }
inline int2 operator/(int2 a, int2 b) { return int2(a.x / b.x, a.y / b.y); }
inline int2 operator>>(int2 a, int2 b) { return int2(a.x >> b.x, a.y >> b.y); }
inline float4 operator*(float4 a, float4 b) {
  return float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
inline float4& operator+=(float4& a, float4 b) {
  return a = float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// float16 by the definition of the format, rounded to nearest even.
struct half {
  std::uint16_t bits;

  explicit half(float value) {
    const unsigned sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) {
      bits = 0x7e00;
    } else if (size >= 65520.0f) {
      bits = sign | 0x7c00;
    } else {
      int exponent = 0;
      std::frexp(size, &exponent);
      exponent = std::max(exponent - 11, -24);
      const int units = int(std::nearbyint(std::ldexp(size, -exponent)));
      // Units up to 2048: what is beyond the fraction carries into the exponent by itself.
      bits = sign | (exponent == -24 ? units : ((exponent + 25) << 10) + units - 1024);
    }
  }

  explicit operator float() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = fraction ? NAN : INFINITY;
    if (exponent == 0) size = std::ldexp(float(fraction), -24);
    if (exponent % 31 != 0) size = std::ldexp(float(fraction + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
  }
};

namespace metal {
enum class mem_flags { mem_threadgroup };
}

namespace metal_on_cpu {

constexpr std::size_t STACK = 256 << 10;

struct Fiber {
  ucontext_t context;
  // Not filled with zeros, which takes longer than a kernel does.
  std::unique_ptr<char[]> stack{new char[STACK]};
  uint3 thread_in_group;
  uint thread_index;
  bool done;
};

inline ucontext_t scheduler;
inline Fiber* current;
inline uint3 group;
inline std::vector<void*> filled;
inline void (*kernel)(void**);
inline void** arguments;
// The barrier that is not there, a fault that a test plants; they are counted from 1.
inline int missing;

inline void start() {
  kernel(arguments);
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void barrier(int which, metal::mem_flags) {
  if (which != missing) swapcontext(&current->context, &scheduler);
}

// The first thread of a threadgroup finds its memory undefined.
template <typename T>
inline void begin(T& memory) {
  if (std::find(filled.begin(), filled.end(), &memory) != filled.end()) return;
  filled.push_back(&memory);
  float* values = reinterpret_cast<float*>(&memory);
  std::fill(values, values + sizeof(T) / sizeof(float), std::numeric_limits<float>::quiet_NaN());
}

// Runs a grid; returns 0, or 1 where not all threads of a threadgroup reached a barrier.
inline int launch(void (*function)(void**), void** values, const uint* groups, const uint* threads,
                  unsigned order, int without) {
  kernel = function;
  arguments = values;
  missing = without;
  std::mt19937 random(order);
  std::vector<Fiber> fibers(threads[0] * threads[1] * threads[2]);
  int diverged = 0;
  for (uint g = 0; g < groups[0] * groups[1] * groups[2]; g++) {
    group = {g % groups[0], g / groups[0] % groups[1], g / groups[0] / groups[1]};
    filled.clear();
    std::vector<Fiber*> live;
    for (uint t = 0; t < fibers.size(); t++) {
      Fiber& fiber = fibers[t];
      fiber.thread_index = t;
      fiber.thread_in_group = {t % threads[0], t / threads[0] % threads[1],
                               t / threads[0] / threads[1]};
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, start, 0);
      live.push_back(&fiber);
    }
    if (order == 1) std::reverse(live.begin(), live.end());
    while (!live.empty()) {
      if (order > 1) std::shuffle(live.begin(), live.end(), random);
      unsigned done = 0;
      for (Fiber* fiber : live) {
        current = fiber;
        swapcontext(&scheduler, &fiber->context);
        done += fiber->done;
      }
      if (done != 0 && done != live.size()) diverged = 1;
      live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* f) { return f->done; }),
                 live.end());
    }
  }
  return diverged;
}

}  // namespace metal_on_cpu
