// float16 by the definition of the format, rounded to nearest even.

#pragma once

#include <algorithm>
#include <cmath>

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
  // std::frexp tells of it the exponent 0, which numbers near 1 have.
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = std::max(exponent - 11, -24);
  const int units = int(std::nearbyint(std::ldexp(size, -exponent)));
  if (exponent == -24) return sign | units;
  // A rounding up to 2048 carries into the exponent by itself.
  return sign | (((exponent + 25) << 10) + units - 1024);
}
