// What `wtconv.metal` uses of the Metal language, for a C++ compiler: a threadgroup's threads are
// fibers.
//
// Threadgroup memory is full of NaNs when a threadgroup starts, so that tests find what is read
// before it is written.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "fibers.h"
#include "half.h"

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

struct half {
  std::uint16_t bits;
  explicit half(float value) : bits(half_bits(value)) {}
  explicit operator float() const { return half_number(bits); }
};

#if __METAL_VERSION__ >= 310
// The upper half of a float32, rounded to nearest even.
struct bfloat {
  std::uint16_t bits;
  explicit bfloat(float value) {
    std::uint32_t whole;
    std::memcpy(&whole, &value, sizeof whole);
    bits = std::isnan(value) ? 0x7fc0 : (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const std::uint32_t whole = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &whole, sizeof value);
    return value;
  }
};
#endif

namespace metal {
enum class mem_flags { mem_threadgroup };
}

namespace metal_on_cpu {

inline uint3 group, group_size;
inline std::vector<void*> filled;
// The barrier that is not there, a fault that a test plants; they are counted from 1.
inline int missing;

inline uint3 place(uint at, uint3 size) {
  return {at % size.x, at / size.x % size.y, at / size.x / size.y};
}

inline uint3 thread_in_group() { return place(on_cpu::current->thread, group_size); }

inline void barrier(int which, metal::mem_flags) {
  if (which != missing) on_cpu::barrier();
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
  missing = without;
  group_size = {threads[0], threads[1], threads[2]};
  on_cpu::Threads block(function, values, threads[0] * threads[1] * threads[2], order);
  bool together = true;
  for (uint g = 0; g < groups[0] * groups[1] * groups[2]; g++) {
    group = place(g, {groups[0], groups[1], groups[2]});
    filled.clear();
    together &= block.run();
  }
  return !together;
}

}  // namespace metal_on_cpu
