// Haar cascades and wavelet convolutions for Apple GPUs, launched by `metal.py`.
//
// A threadgroup treats a square of one plane, an image of one channel. Bands come in the order LL,
// LH, HL, HH, high along no axis, H, W, both. Everything between loads and stores is float32.
// Kernels of bfloat16 are there from Metal 3.1 on, which has the type.
//
// Compiled as it is, this holds the cascades. It is one level of the wavelet convolution if the
// lines before it define
//   KERNEL_SIZE  of the convolutions,
//   TILE         the side of a threadgroup's square, in coefficients,
//   ROWS         coefficients below each other that a thread computes: they share what they read,
//   SLICES       threads that share the rows of a square in a weight gradient.

#include <metal_stdlib>

using namespace metal;

// Of a 2 x 2 block a b / c d; it is its own inverse.
inline float4 haar(float4 block) {
  const float above = block.x + block.y, below = block.z + block.w;
  const float left = block.x - block.y, right = block.z - block.w;
  return 0.5f * float4(above + below, above - below, left + right, left - right);
}

// Zero outside of the plane, which pads odd sizes and convolutions alike.
template <typename T>
inline float read_pixel(device const T* plane, int2 size, int2 strides, int row, int column) {
  const bool inside = row >= 0 && row < size.x && column >= 0 && column < size.y;
  return inside ? float(plane[row * strides.x + column * strides.y]) : 0.0f;
}

template <typename T>
inline float4 read_block(device const T* plane, int2 size, int2 strides, int row, int column) {
  return float4(read_pixel(plane, size, strides, 2 * row, 2 * column),
                read_pixel(plane, size, strides, 2 * row, 2 * column + 1),
                read_pixel(plane, size, strides, 2 * row + 1, 2 * column),
                read_pixel(plane, size, strides, 2 * row + 1, 2 * column + 1));
}

template <typename T>
inline void store_pixel(device T* plane, int2 size, int2 strides, int row, int column,
                        float value) {
  if (row < size.x && column < size.y) plane[row * strides.x + column * strides.y] = T(value);
}

template <typename T>
inline void store_block(device T* plane, int2 size, int2 strides, int row, int column,
                        float4 values) {
  store_pixel(plane, size, strides, 2 * row, 2 * column, values.x);
  store_pixel(plane, size, strides, 2 * row, 2 * column + 1, values.y);
  store_pixel(plane, size, strides, 2 * row + 1, 2 * column, values.z);
  store_pixel(plane, size, strides, 2 * row + 1, 2 * column + 1, values.w);
}

// An array [N, C, H, W] of any strides; those within a plane fit into 32 bits.
struct Planes {
  long n, c, h, w;
};

inline long plane_offset(constant Planes& strides, long channels, uint plane) {
  return plane / channels * strides.n + plane % channels * strides.c;
}

inline int2 plane_strides(constant Planes& strides) { return int2(int(strides.h), int(strides.w)); }

inline int2 halved(int2 size) { return (size + 1) / 2; }

// Row and column where a threadgroup's square begins.
inline int2 first_of(uint3 group, int side) { return int2(int(group.y), int(group.x)) * side; }

#ifndef KERNEL_SIZE

// Threads along each side of a threadgroup, each a block of the first level.
constant constexpr int SQUARE = 16;
constant constexpr int LEVELS = 5;

struct Cascade {
  long channels, height, width, levels;
  Planes image;
};

// DETAILS: the high bands [planes, 3, h, w] of every level, and the low band of the last.
// Otherwise the low band [planes, h, w] of every level.
template <typename T, typename O, bool DETAILS>
inline void analysis(device const T* x, device O* level_1, device O* level_2, device O* level_3,
                     device O* level_4, device O* level_5, device O* low_band,
                     constant Cascade& sizes, threadgroup float (&low)[SQUARE][SQUARE], uint3 group,
                     uint3 thread_in_group) {
  device O* const levels[LEVELS] = {level_1, level_2, level_3, level_4, level_5};
  const int row = thread_in_group.y, column = thread_in_group.x;
  int2 size = int2(int(sizes.height), int(sizes.width));
  const int2 first = first_of(group, SQUARE);
  float4 values = read_block(x + plane_offset(sizes.image, sizes.channels, group.z), size,
                             plane_strides(sizes.image), first.x + row, first.y + column);
  for (int level = 0, side = SQUARE; level < LEVELS && level < sizes.levels; level++, side /= 2) {
    const bool active = row < side && column < side;
    if (level > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (active) {
        values = float4(low[2 * row][2 * column], low[2 * row][2 * column + 1],
                        low[2 * row + 1][2 * column], low[2 * row + 1][2 * column + 1]);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (!active) continue;
    size = halved(size);
    const float4 bands = haar(values);
    low[row][column] = bands.x;
    const int2 at = first_of(group, side) + int2(row, column), strides = int2(size.y, 1);
    const long plane = long(size.x) * size.y;
    if (DETAILS) {
      device O* const details = levels[level] + group.z * 3 * plane;
      store_pixel(details, size, strides, at.x, at.y, bands.y);
      store_pixel(details + plane, size, strides, at.x, at.y, bands.z);
      store_pixel(details + 2 * plane, size, strides, at.x, at.y, bands.w);
      if (level == sizes.levels - 1) {
        store_pixel(low_band + group.z * plane, size, strides, at.x, at.y, bands.x);
      }
    } else {
      store_pixel(levels[level] + group.z * plane, size, strides, at.x, at.y, bands.x);
    }
  }
}

template <typename T>
inline void synthesis(device T* y, device const T* level_1, device const T* level_2,
                      device const T* level_3, device const T* level_4, device const T* level_5,
                      device const T* low_band, constant Cascade& sizes,
                      threadgroup float (&low)[SQUARE][SQUARE], uint3 group,
                      uint3 thread_in_group) {
  device const T* const levels[LEVELS] = {level_1, level_2, level_3, level_4, level_5};
  const int row = thread_in_group.y, column = thread_in_group.x, deepest = sizes.levels - 1;
  for (int level = LEVELS - 1; level >= 0; level--) {
    if (level > deepest) continue;
    const int side = SQUARE >> level;
    const bool active = row < side && column < side;
    const int2 at = first_of(group, side) + int2(row, column);
    const int2 above = (int2(int(sizes.height), int(sizes.width)) + ((1 << level) - 1)) >> level;
    const int2 size = halved(above), strides = int2(size.y, 1);
    const long plane = long(size.x) * size.y;
    float4 bands = 0.0f;
    if (active) {
      device const T* const details = levels[level] + group.z * 3 * plane;
      bands = float4(level == deepest
                         ? read_pixel(low_band + group.z * plane, size, strides, at.x, at.y)
                         : low[row][column],
                     read_pixel(details, size, strides, at.x, at.y),
                     read_pixel(details + plane, size, strides, at.x, at.y),
                     read_pixel(details + 2 * plane, size, strides, at.x, at.y));
    }
    const float4 values = haar(bands);
    if (level == 0) {
      store_block(y + plane_offset(sizes.image, sizes.channels, group.z), above,
                  plane_strides(sizes.image), at.x, at.y, values);
    } else {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (active) {
        low[2 * row][2 * column] = values.x;
        low[2 * row][2 * column + 1] = values.y;
        low[2 * row + 1][2 * column] = values.z;
        low[2 * row + 1][2 * column + 1] = values.w;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

#define ANALYSIS(NAME, T, O, DETAILS)                                                             \
  [[kernel, max_total_threads_per_threadgroup(SQUARE * SQUARE)]] void NAME(                       \
      device const T* x [[buffer(0)]], device O* level_1 [[buffer(1)]],                           \
      device O* level_2 [[buffer(2)]], device O* level_3 [[buffer(3)]],                           \
      device O* level_4 [[buffer(4)]], device O* level_5 [[buffer(5)]],                           \
      device O* low_band [[buffer(6)]], constant Cascade& sizes [[buffer(7)]],                    \
      uint3 group [[threadgroup_position_in_grid]],                                               \
      uint3 thread_in_group [[thread_position_in_threadgroup]]) {                                 \
    threadgroup float low[SQUARE][SQUARE];                                                        \
    analysis<T, O, DETAILS>(x, level_1, level_2, level_3, level_4, level_5, low_band, sizes, low, \
                            group, thread_in_group);                                              \
  }

#define SYNTHESIS(NAME, T)                                                                    \
  [[kernel, max_total_threads_per_threadgroup(SQUARE * SQUARE)]] void NAME(                   \
      device T* y [[buffer(0)]], device const T* level_1 [[buffer(1)]],                       \
      device const T* level_2 [[buffer(2)]], device const T* level_3 [[buffer(3)]],           \
      device const T* level_4 [[buffer(4)]], device const T* level_5 [[buffer(5)]],           \
      device const T* low_band [[buffer(6)]], constant Cascade& sizes [[buffer(7)]],          \
      uint3 group [[threadgroup_position_in_grid]],                                           \
      uint3 thread_in_group [[thread_position_in_threadgroup]]) {                             \
    threadgroup float low[SQUARE][SQUARE];                                                    \
    synthesis<T>(y, level_1, level_2, level_3, level_4, level_5, low_band, sizes, low, group, \
                 thread_in_group);                                                            \
  }

ANALYSIS(low_bands_float32, float, float, false)
ANALYSIS(low_bands_float16, half, float, false)
ANALYSIS(analysis_float32, float, float, true)
ANALYSIS(analysis_float16, half, half, true)
SYNTHESIS(synthesis_float32, float)
SYNTHESIS(synthesis_float16, half)
#if __METAL_VERSION__ >= 310
ANALYSIS(low_bands_bfloat16, bfloat, float, false)
ANALYSIS(analysis_bfloat16, bfloat, bfloat, true)
SYNTHESIS(synthesis_bfloat16, bfloat)
#endif

#else

constant constexpr int K = KERNEL_SIZE;
constant constexpr int SIDE = TILE + K - 1;

// Blocks of `plane` from `first` on, pixels apart by their place in the block.
template <typename T, int S>
inline void load_blocks(device const T* plane, int2 size, int2 strides, int2 first,
                        threadgroup float (&tile)[4][S][S], int thread_index, int threads) {
  for (int i = thread_index; i < S * S; i += threads) {
    const int row = i / S, column = i % S;
    const float4 pixels = read_block(plane, size, strides, first.x + row, first.y + column);
    tile[0][row][column] = pixels.x;
    tile[1][row][column] = pixels.y;
    tile[2][row][column] = pixels.z;
    tile[3][row][column] = pixels.w;
  }
}

// Pixels to bands, in place: each thread the blocks that it loaded.
template <int S>
inline void analyse(threadgroup float (&tile)[4][S][S], int thread_index, int threads) {
  for (int i = thread_index; i < S * S; i += threads) {
    const int row = i / S, column = i % S;
    const float4 bands = haar(float4(tile[0][row][column], tile[1][row][column],
                                     tile[2][row][column], tile[3][row][column]));
    tile[0][row][column] = bands.x;
    tile[1][row][column] = bands.y;
    tile[2][row][column] = bands.z;
    tile[3][row][column] = bands.w;
  }
}

template <int S>
inline float pixel_of(threadgroup float (&tile)[4][S][S], int row, int column) {
  return tile[2 * (row & 1) + (column & 1)][row >> 1][column >> 1];
}

constant constexpr int THREADS = TILE * TILE / ROWS;

struct Level {
  long channels, height, width;
  // Taps before the centre, and whether there are an image from the levels below and a bias.
  long before, below, bias;
  Planes x, y;
};

// z = synthesis(convolved bands of x), after the levels below were added to the low band.
// BASE adds the convolution of x itself.
template <typename T, bool BASE>
inline void convolve_level(device const T* x, device const float* below, device const float* taps,
                           device const float* base, device const float* bias, device T* y,
                           constant Level& sizes, threadgroup float (&tile)[4][SIDE][SIDE],
                           threadgroup float (&weights)[5 * K * K], uint3 group,
                           uint3 thread_in_group, int thread_index) {
  const int2 size = int2(int(sizes.height), int(sizes.width));
  const int2 first = first_of(group, TILE);
  // A constant for odd kernels, so that the place of each pixel of a block is one too.
  const int before = K % 2 ? K / 2 : int(sizes.before);
  const int channel = group.z % sizes.channels;
  for (int i = thread_index; i < 4 * K * K; i += THREADS) {
    weights[i] = taps[channel * 4 * K * K + i];
  }
  if (BASE) {
    for (int i = thread_index; i < K * K; i += THREADS) {
      weights[4 * K * K + i] = base[channel * K * K + i];
    }
  }
  load_blocks(x + plane_offset(sizes.x, sizes.channels, group.z), size, plane_strides(sizes.x),
              first - before, tile, thread_index, THREADS);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int row = thread_in_group.y * ROWS, column = thread_in_group.x;
  float pixels[2 * ROWS][2] = {};
  if (BASE) {
    for (int right = 0; right < 2; right++) {
      for (int j = 0; j < K; j++) {
        float line[2 * ROWS + K - 1];
        for (int i = 0; i < 2 * ROWS + K - 1; i++) {
          line[i] = pixel_of(tile, 2 * row + before + i, 2 * column + right + before + j);
        }
        for (int i = 0; i < K; i++) {
          const float weight = weights[4 * K * K + i * K + j];
          for (int r = 0; r < 2 * ROWS; r++) pixels[r][right] += weight * line[r + i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  analyse(tile, thread_index, THREADS);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float bands[4][ROWS] = {};
  for (int band = 0; band < 4; band++) {
    for (int j = 0; j < K; j++) {
      float line[ROWS + K - 1];
      for (int i = 0; i < ROWS + K - 1; i++) line[i] = tile[band][row + i][column + j];
      for (int i = 0; i < K; i++) {
        const float weight = weights[(band * K + i) * K + j];
        for (int r = 0; r < ROWS; r++) bands[band][r] += weight * line[r + i];
      }
    }
  }
  const int2 half_size = halved(size), half_strides = int2(half_size.y, 1);
  const float added = BASE && sizes.bias ? bias[channel] : 0.0f;
  for (int r = 0; r < ROWS; r++) {
    const int2 at = first + int2(row + r, column);
    float low = bands[0][r];
    if (sizes.below) {
      low += read_pixel(below + long(group.z) * half_size.x * half_size.y, half_size, half_strides,
                        at.x, at.y);
    }
    float4 values = haar(float4(low, bands[1][r], bands[2][r], bands[3][r]));
    if (BASE) {
      values +=
          float4(pixels[2 * r][0], pixels[2 * r][1], pixels[2 * r + 1][0], pixels[2 * r + 1][1]);
      values += added;
    }
    store_block(y + plane_offset(sizes.y, sizes.channels, group.z), size, plane_strides(sizes.y),
                at.x, at.y, values);
  }
}

#define LEVEL(NAME, T, BASE)                                                             \
  [[kernel, max_total_threads_per_threadgroup(THREADS)]] void NAME(                      \
      device const T* x [[buffer(0)]], device const float* below [[buffer(1)]],          \
      device const float* taps [[buffer(2)]], device const float* base [[buffer(3)]],    \
      device const float* bias [[buffer(4)]], device T* y [[buffer(5)]],                 \
      constant Level& sizes [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]], \
      uint3 thread_in_group [[thread_position_in_threadgroup]],                          \
      uint thread_index [[thread_index_in_threadgroup]]) {                               \
    threadgroup float tile[4][SIDE][SIDE];                                               \
    threadgroup float weights[5 * K * K];                                                \
    convolve_level<T, BASE>(x, below, taps, base, bias, y, sizes, tile, weights, group,  \
                            thread_in_group, thread_index);                              \
  }

LEVEL(first_level_float32, float, true)
LEVEL(first_level_float16, half, true)
#if __METAL_VERSION__ >= 310
LEVEL(first_level_bfloat16, bfloat, true)
#endif
LEVEL(level_float32, float, false)

constant constexpr int SUMMING = 256;
constant constexpr int COLUMNS = 8;

struct Weights {
  long images, channels, height, width, programs;
  Planes x, dy;
};

// sums[program, slice, channel, band, i, j] = sum of x(p + (i, j) - before) dy(p), of the bands
// and, as base_sums[program, band, slice, channel, i, j], of the pixels (BASE). A thread sums for
// one band and one row of taps over every SLICES-th row of squares that it visits in turn, so that
// no two threads add to one number and the order is always the same.
template <typename T, bool BASE>
inline void correlate(device const T* x, device const T* dy, device float* sums,
                      device float* base_sums, constant Weights& sizes,
                      threadgroup float (&tile)[4][SIDE][SIDE],
                      threadgroup float (&other)[4][TILE][TILE], uint3 group, int thread_index) {
  constexpr int BEFORE = (K - 1) / 2;
  const int2 size = int2(int(sizes.height), int(sizes.width));
  const int2 tiles = (halved(size) + (TILE - 1)) / TILE;
  const int band = thread_index / (K * SLICES), i = thread_index / SLICES % K;
  const int slice = thread_index % SLICES;
  const bool active = band < 4;
  float found[K] = {}, base_found[K] = {};
  const long squares = sizes.images * tiles.x * tiles.y;
  for (long square = group.x; square < squares; square += sizes.programs) {
    const int2 first = int2(int(square / tiles.y % tiles.x), int(square % tiles.y)) * TILE;
    const uint plane = square / tiles.y / tiles.x * sizes.channels + group.y;
    // All threads have read the square before this one.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_blocks(x + plane_offset(sizes.x, sizes.channels, plane), size, plane_strides(sizes.x),
                first - BEFORE, tile, thread_index, SUMMING);
    load_blocks(dy + plane_offset(sizes.dy, sizes.channels, plane), size, plane_strides(sizes.dy),
                first, other, thread_index, SUMMING);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (BASE) {
      for (int row = band * SLICES + slice; active && row < 2 * TILE; row += 4 * SLICES) {
        for (int column = 0; column < 2 * TILE; column += COLUMNS) {
          float line[COLUMNS + K - 1], factors[COLUMNS];
          for (int m = 0; m < COLUMNS + K - 1; m++) {
            line[m] = pixel_of(tile, row + BEFORE + i, column + BEFORE + m);
          }
          for (int m = 0; m < COLUMNS; m++) factors[m] = pixel_of(other, row, column + m);
          for (int j = 0; j < K; j++) {
            for (int m = 0; m < COLUMNS; m++) base_found[j] += line[m + j] * factors[m];
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    analyse(tile, thread_index, SUMMING);
    analyse(other, thread_index, SUMMING);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int row = slice; active && row < TILE; row += SLICES) {
      for (int column = 0; column < TILE; column += COLUMNS) {
        float line[COLUMNS + K - 1], factors[COLUMNS];
        for (int m = 0; m < COLUMNS + K - 1; m++) line[m] = tile[band][row + i][column + m];
        for (int m = 0; m < COLUMNS; m++) factors[m] = other[band][row][column + m];
        for (int j = 0; j < K; j++) {
          for (int m = 0; m < COLUMNS; m++) found[j] += line[m + j] * factors[m];
        }
      }
    }
  }
  if (!active) return;
  const long program = group.x, channel = group.y;
  const long at = ((program * SLICES + slice) * sizes.channels + channel) * 4 + band;
  for (int j = 0; j < K; j++) sums[(at * K + i) * K + j] = found[j];
  if (BASE) {
    const long part = (program * 4 + band) * SLICES + slice;
    for (int j = 0; j < K; j++) {
      base_sums[((part * sizes.channels + channel) * K + i) * K + j] = base_found[j];
    }
  }
}

#define WEIGHTS(NAME, T, BASE)                                                             \
  [[kernel, max_total_threads_per_threadgroup(SUMMING)]] void NAME(                        \
      device const T* x [[buffer(0)]], device const T* dy [[buffer(1)]],                   \
      device float* sums [[buffer(2)]], device float* base_sums [[buffer(3)]],             \
      constant Weights& sizes [[buffer(4)]], uint3 group [[threadgroup_position_in_grid]], \
      uint thread_index [[thread_index_in_threadgroup]]) {                                 \
    threadgroup float tile[4][SIDE][SIDE];                                                 \
    threadgroup float other[4][TILE][TILE];                                                \
    correlate<T, BASE>(x, dy, sums, base_sums, sizes, tile, other, group, thread_index);   \
  }

WEIGHTS(first_weights_float32, float, true)
WEIGHTS(first_weights_float16, half, true)
#if __METAL_VERSION__ >= 310
WEIGHTS(first_weights_bfloat16, bfloat, true)
#endif
WEIGHTS(weights_float32, float, false)

#endif
