// Depthwise convolution of 16-bit images [N, H, W, C] on tensor cores, for NVRTC.
//
// A channel's convolution is a product of matrices. M: 16 blocks of four columns of one pair of
// rows. K: a pair of rows of the pixels that such a block reads. N: its four columns of a pair of
// rows of the output. So the taps are a Toeplitz matrix, which the host makes once, and pairs of
// rows stream through: each is multiplied for all pairs of the output that it reaches, whose sums
// wait in registers. Blocks lie beside each other and, where images are narrow, in strips of rows
// below each other, so that every row of M counts.
//
// Pixels are kept in shared memory as groups of four channels, one group after the other: a warp
// treats a group, and its loads of 8 bytes are neighbours.
//
// Arithmetic is that of the tensor cores: products of 16-bit numbers, summed in float32. A pixel
// that is Inf or NaN is multiplied by zeros of the Toeplitz matrix too: it makes NaN of the block's
// four columns and pair of rows wherever its matrix reaches.
//
// The host defines these macros:
//   BFLOAT16         1 bfloat16, 0 float16
//   KERNEL_SIZE      3, 5 or 7
//   ACROSS           blocks beside each other: 1, 2, 4, 8 or 16
//   PAIRS            pairs of rows of a strip
//   STAGES           pairs of rows in shared memory, at least 2
//   VECTOR           channels that one access to memory takes: 4, 2 or 1, a divisor of C

typedef unsigned short Scalar;
typedef long long Offset;

#define DEVICE __device__ __forceinline__
#ifndef SHARED
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

constexpr int R = KERNEL_SIZE / 2;
constexpr int REACH = (R + 1) / 2;               // Pairs of rows that a pair reads to each side.
constexpr int REACHED = 2 * REACH + 1;           // Pairs of the output that a pair is multiplied for.
constexpr int HALO = R > 2 ? 4 : 2;              // Columns that a block reads to each side.
constexpr int PARTS = 1 + HALO / 2;              // Times four columns that a block reads.
constexpr int STRIPS = 16 / ACROSS;
constexpr int WIDTH = 4 * ACROSS, HEIGHT = 2 * PAIRS * STRIPS;  // Pixels of a tile.
constexpr int LOADED = WIDTH + 2 * HALO;                        // Columns that it reads.
constexpr int GROUP = 4, GROUPS = 8, CHANNELS = GROUP * GROUPS; // Channels of a warp, of a block.
constexpr int THREADS = 32 * GROUPS;
constexpr int STEPS = PAIRS + 2 * REACH;

// Bytes from one group to the next: 16 more than a multiple of 128, so that the eight groups of a
// pixel are in different banks.
DEVICE constexpr int group_bytes(int pixels) { return (8 * pixels + 127) / 128 * 128 + 16; }

constexpr int IN_PIXELS = 2 * STRIPS * LOADED, OUT_PIXELS = 2 * STRIPS * WIDTH;
constexpr int IN_GROUP = group_bytes(IN_PIXELS), OUT_GROUP = group_bytes(OUT_PIXELS);
constexpr int IN_STAGE = GROUPS * IN_GROUP, OUT_STAGE = GROUPS * OUT_GROUP;

// ---------------------------------------------------------------------------------------------
// Instructions, which the CPU's emulation has as functions of the same names

struct alignas(8) Four {
  unsigned low, high;  // Channels 0 and 1, 2 and 3.
};

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

DEVICE void multiply16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                       const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
#else
  float half[4];
  multiply8(half, a[0], a[1], b0, c);
  multiply8(d, a[2], a[3], b1, half);
#endif
}

// Copies BYTES to shared memory, zeros where they are outside of the image.
template <int BYTES>
DEVICE void copy(void* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(
                   unsigned(__cvta_generic_to_shared(to))),
               "l"(from), "n"(BYTES), "r"(inside ? BYTES : 0)
               : "memory");
#else
  if (BYTES == 8) {
    *reinterpret_cast<Four*>(to) = inside ? *reinterpret_cast<const Four*>(from) : Four{0, 0};
  } else {
    *reinterpret_cast<unsigned*>(to) = inside ? *reinterpret_cast<const unsigned*>(from) : 0;
  }
#endif
}

DEVICE void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of copies but the last PENDING.
template <int PENDING>
DEVICE void wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
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

#else

DEVICE void multiply8(float (&d)[4], unsigned a0, unsigned a1, unsigned b, const float (&c)[4]) {
  cuda_on_cpu::multiply<1>(d, {a0, a1}, {b}, c, BFLOAT16);
}
DEVICE void multiply16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                       const float (&c)[4]) {
  cuda_on_cpu::multiply<2>(d, {a[0], a[1], a[2], a[3]}, {b0, b1}, c, BFLOAT16);
}
template <int BYTES>
DEVICE void copy(void* to, const void* from, bool inside) {
  cuda_on_cpu::copy(to, from, BYTES, inside);
}
DEVICE void commit() { cuda_on_cpu::commit(); }
template <int PENDING>
DEVICE void wait() {
  cuda_on_cpu::wait(PENDING);
}
DEVICE unsigned packed(float low, float high) { return cuda_on_cpu::packed(low, high, BFLOAT16); }

#endif

// ---------------------------------------------------------------------------------------------

// The tile of a thread block.
struct Tile {
  Offset image;  // Offset of the image in the array.
  int top, left, channel;
};

DEVICE Tile tile_at(int at, int channels, int height, int width) {
  const int chunks = (channels + CHANNELS - 1) / CHANNELS;
  const int across = (width + WIDTH - 1) / WIDTH, down = (height + HEIGHT - 1) / HEIGHT;
  Tile tile;
  // Consecutive blocks take neighbours in memory.
  tile.channel = at % chunks * CHANNELS;
  at /= chunks;
  tile.left = at % across * WIDTH;
  at /= across;
  tile.top = at % down * HEIGHT;
  tile.image = Offset(at / down) * height * width * channels;
  return tile;
}

// Starts the copies of one pair of rows of every strip, `pair` rows of pairs below the strip's top.
DEVICE void load_pair(const Scalar* __restrict__ x, const Tile& tile, int pair, int channels,
                      int height, int width, unsigned char* stage) {
#pragma unroll 1
  for (int item = threadIdx.x; item < IN_PIXELS * GROUPS; item += THREADS) {
    const int group = item % GROUPS, pixel = item / GROUPS;
    const int column = tile.left - HALO + pixel % LOADED, line = pixel / LOADED;
    const int row = tile.top + 2 * PAIRS * (line / 2) + 2 * pair + line % 2;
    const int channel = tile.channel + GROUP * group;
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    unsigned char* to = stage + group * IN_GROUP + 8 * pixel;
    const Scalar* from = x + tile.image + (Offset(row) * width + column) * channels + channel;
#pragma unroll
    for (int i = 0; i < GROUP; i += VECTOR) {
      const bool there = inside && channel + i < channels;
#if VECTOR == 1
      reinterpret_cast<Scalar*>(to)[i] = there ? from[i] : Scalar(0);
#else
      // An address that is not read is x's own.
      copy<2 * VECTOR>(to + 2 * i, there ? from + i : x, there);
#endif
    }
  }
  commit();
}

// Stores a pair of rows of every strip, which another step has left in shared memory.
DEVICE void store_pair(const unsigned char* stage, const Tile& tile, int pair, int channels,
                       int height, int width, Scalar* __restrict__ y) {
#pragma unroll 1
  for (int item = threadIdx.x; item < OUT_PIXELS * GROUPS; item += THREADS) {
    const int group = item % GROUPS, pixel = item / GROUPS;
    const int column = tile.left + pixel % WIDTH, line = pixel / WIDTH;
    const int row = tile.top + 2 * PAIRS * (line / 2) + 2 * pair + line % 2;
    const int channel = tile.channel + GROUP * group;
    if (row >= height || column >= width) continue;
    const Four values = *reinterpret_cast<const Four*>(stage + group * OUT_GROUP + 8 * pixel);
    Scalar* to = y + tile.image + (Offset(row) * width + column) * channels + channel;
#if VECTOR == 4
    if (channel < channels) *reinterpret_cast<Four*>(to) = values;
#elif VECTOR == 2
    if (channel < channels) *reinterpret_cast<unsigned*>(to) = values.low;
    if (channel + 2 < channels) *reinterpret_cast<unsigned*>(to + 2) = values.high;
#else
    if (channel < channels) to[0] = Scalar(values.low);
    if (channel + 1 < channels) to[1] = Scalar(values.low >> 16);
    if (channel + 2 < channels) to[2] = Scalar(values.high);
    if (channel + 3 < channels) to[3] = Scalar(values.high >> 16);
#endif
  }
}

// The two rows' values of one channel, the upper one in the lower half.
DEVICE unsigned of_channel(int channel, const Four& upper, const Four& lower) {
  const unsigned one = channel < 2 ? upper.low : upper.high;
  const unsigned other = channel < 2 ? lower.low : lower.high;
  return __byte_perm(one, other, channel % 2 ? 0x7632 : 0x5410);
}

// A thread block makes one tile of 32 channels. Taps are the Toeplitz matrices as registers,
// `[C, REACHED * PARTS, 32, 2]`; the bias is `[C]` or null.
extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_forward(const Scalar* __restrict__ x, const unsigned* __restrict__ taps,
                  const float* __restrict__ bias, int channels, int height, int width,
                  Scalar* __restrict__ y) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  unsigned char* const results = shared + STAGES * IN_STAGE;
  const Tile tile = tile_at(blockIdx.x, channels, height, width);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = tile.channel + GROUP * warp;

  unsigned matrix[GROUP][REACHED * PARTS];
  float offsets[GROUP];
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
    const bool there = first + c < channels;
    offsets[c] = there && bias != nullptr ? bias[first + c] : 0.0f;
#pragma unroll
    for (int i = 0; i < REACHED * PARTS; i++)
      matrix[c][i] = there ? taps[(Offset(first + c) * REACHED * PARTS + i) * 32 + lane] : 0;
  }

  // This thread's two blocks, and its column of them.
  int from[2], to[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int block = lane / 4 + 8 * h, column = block % ACROSS * 4 + lane % 4;
    from[h] = warp * IN_GROUP + 8 * (block / ACROSS * 2 * LOADED + column);
    to[h] = warp * OUT_GROUP + 8 * (block / ACROSS * 2 * WIDTH + column);
  }

  // The last of each channel's stay zero: the pair of the output that a pair is the first for.
  float sums[GROUP][REACHED + 1][4] = {};
#pragma unroll 1
  for (int step = 0; step < STAGES - 1; step++)
    load_pair(x, tile, step - REACH, channels, height, width, shared + step * IN_STAGE);
#pragma unroll 1
  for (int step = 0; step <= STEPS; step++) {
    wait<STAGES - 2>();
    // What this step reads is there, and nobody reads what is overwritten from here on.
    __syncthreads();
    if (step > 2 * REACH)
      store_pair(results + (step - 1) % 2 * OUT_STAGE, tile, step - 1 - 2 * REACH, channels, height,
                 width, y);
    if (step == STEPS) break;
    const int next = step + STAGES - 1;
    if (next < STEPS) {
      load_pair(x, tile, next - REACH, channels, height, width, shared + next % STAGES * IN_STAGE);
    } else {
      commit();
    }

    Four pixels[2][2][PARTS];
    const unsigned char* stage = shared + step % STAGES * IN_STAGE;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          pixels[h][r][part] =
              *reinterpret_cast<const Four*>(stage + from[h] + 8 * (r * LOADED + 4 * part));
      }
    }
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
      unsigned values[PARTS][2];
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int h = 0; h < 2; h++)
          values[part][h] = of_channel(c, pixels[h][0][part], pixels[h][1][part]);
      }
      const unsigned both[4] = {values[0][0], values[0][1], values[1][0], values[1][1]};
#pragma unroll
      for (int i = 0; i < REACHED; i++) {
        // The pair of the output that waits for i more pairs after this one.
        const unsigned* b = matrix[c] + (REACHED - 1 - i) * PARTS;
        multiply16(sums[c][i], both, b[0], b[1], sums[c][i + 1]);
#if KERNEL_SIZE > 5
        multiply8(sums[c][i], values[2][0], values[2][1], b[2], sums[c][i]);
#endif
      }
    }
    if (step < 2 * REACH) continue;
    unsigned char* result = results + step % 2 * OUT_STAGE;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float out[GROUP];
#pragma unroll
        for (int c = 0; c < GROUP; c++) out[c] = sums[c][0][2 * h + r] + offsets[c];
        *reinterpret_cast<Four*>(result + to[h] + 8 * r * WIDTH) =
            Four{packed(out[0], out[1]), packed(out[2], out[3])};
      }
    }
  }
}
