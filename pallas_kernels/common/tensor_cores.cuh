// Instructions for 16-bit images on tensor cores, for NVRTC and for the emulation on a CPU, which has
// them as functions of the same names: products, beside copies in groups, copies of boxes, barriers.
//
// Rows of pixels are kept in shared memory as TMA lays them with swizzles of 64 bytes: 32 channels a
// pixel, whose pieces of 16 bytes change places from one pair of pixels to the next, so that a
// warp's loads of neighbouring pixels are in different banks. It must begin at a multiple of 512
// bytes, a stage that a box is copied to at a multiple of 1024.
//
// The host defines BFLOAT16, 1 or 0 for float16.

typedef unsigned short Scalar;

#include "boxes.cuh"

constexpr int CHUNK = 32;  // Channels of a pixel in shared memory.
constexpr int PIXEL = sizeof(Scalar) * CHUNK;

// Where a byte of rows of pixels lies in shared memory.
DEVICE constexpr int swizzled(int byte) { return byte ^ (byte >> 7 & 3) << 4; }

#ifdef __CUDACC__

#if BFLOAT16
#define MMA_TYPES "f32.bf16.bf16.f32"
#else
#define MMA_TYPES "f32.f16.f16.f32"
#endif

DEVICE void multiply8(float (&d)[4], unsigned a0, unsigned a1, unsigned b, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col." MMA_TYPES " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

DEVICE void multiply16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                       unsigned b0, unsigned b1, const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#else
  float half[4];
  multiply8(half, a0, a1, b0, c);
  multiply8(d, a2, a3, b1, half);
#endif
}

// A side of a product from shared memory: COUNT matrices of 8 rows of 16 bytes, 2 or 4, of which lane
// 8i + j gives the place of row j of matrix i.
template <int COUNT>
DEVICE void matrices(unsigned (&d)[COUNT], const void* row) {
  if constexpr (COUNT == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(address(row))
                 : "memory");
  }
}

#if BFLOAT16
DEVICE unsigned packed(float low, float high) {
  unsigned result;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
#error "bfloat16 needs compute capability 8.0"
#endif
  return result;
}
#else
DEVICE unsigned packed(float low, float high) {
  Scalar parts[2];
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(parts[0]) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(parts[1]) : "f"(high));
  return parts[0] | unsigned(parts[1]) << 16;
}
#endif

// The number in half a register.
DEVICE float number_of(Scalar bits) {
#if BFLOAT16
  return __uint_as_float(unsigned(bits) << 16);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
#endif
}

#else

DEVICE void multiply8(float (&d)[4], unsigned a0, unsigned a1, unsigned b, const float (&c)[4]) {
  cuda_on_cpu::multiply<1>(d, {a0, a1}, {b}, c, BFLOAT16);
}
DEVICE void multiply16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                       unsigned b0, unsigned b1, const float (&c)[4]) {
  cuda_on_cpu::multiply<2>(d, {a0, a1, a2, a3}, {b0, b1}, c, BFLOAT16);
}
template <int COUNT>
DEVICE void matrices(unsigned (&d)[COUNT], const void* row) {
  cuda_on_cpu::matrices(d, row);
}
DEVICE unsigned packed(float low, float high) { return cuda_on_cpu::packed(low, high, BFLOAT16); }
DEVICE float number_of(Scalar bits) { return cuda_on_cpu::number16(bits, BFLOAT16); }

#endif

// The values of one of four channels of two rows, the upper row's in the lower half: a register of a
// product's side, whose K counts rows of a pair fastest.
DEVICE unsigned of_channel(int channel, const Four& upper, const Four& lower) {
  const unsigned one = channel < 2 ? upper.low : upper.high;
  const unsigned other = channel < 2 ? lower.low : lower.high;
  return __byte_perm(one, other, channel % 2 ? 0x7632 : 0x5410);
}
