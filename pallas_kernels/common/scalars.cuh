// The numbers of arrays of three dtypes, for NVRTC and for the emulation on a CPU.
//
// The host defines DTYPE: 0 float32, 1 bfloat16, 2 float16.

#if DTYPE == 0
typedef float Scalar;
#else
typedef unsigned short Scalar;
#endif

typedef long long Offset;

#define DEVICE __device__ __forceinline__

#if DTYPE == 0
DEVICE float number(Scalar v) { return v; }
DEVICE Scalar scalar(float v) { return v; }
#elif DTYPE == 1
DEVICE float number(Scalar v) { return __uint_as_float(unsigned(v) << 16); }
DEVICE Scalar scalar(float v) {
#if __CUDA_ARCH__ >= 800
  Scalar result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(v));
  return result;
#else
  const unsigned bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return Scalar((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
}
#elif defined(__CUDACC__)
DEVICE float number(Scalar v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v));
  return result;
}
DEVICE Scalar scalar(float v) {
  Scalar result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(v));
  return result;
}
#else
DEVICE float number(Scalar v) { return half_number(v); }
DEVICE Scalar scalar(float v) { return half_bits(v); }
#endif
