// The wavelet convolution with Haar wavelets on images of either memory format, for NVRTC.
//
// A thread block loads a tile of PLANES planes into shared memory, as the coefficients of LEVELS
// levels with zeros around the image, and does not keep x: x is the synthesis of its first level. A
// plane is an image of one channel; in channels-last memory the planes of a block are channels of
// one image. Tiles are whole planes, or parts of planes with the halo that the levels need.
//
// Coefficients are unnormalised sums: level l holds 2^l times those of the transform. That factor,
// and the same one of the synthesis, are folded into the taps, exactly, as they are powers of two.
//
// A thread filters patches of four columns, with the taps of a band in registers. It loads a patch
// and its neighbours 16 bytes at a time; the zeros around the image make masks needless.
//
// The host defines these macros. Those that a level has are lists, from level 1 on:
//   FORWARD, LOW or WEIGHTS    the kernel to compile
//   DTYPE            0 float32, 1 bfloat16, 2 float16
//   KERNEL_SIZE      odd
//   LEVELS           1 to 5
//   TILE_H, TILE_W   pixels of a tile
//   PLANES           planes of a block
//   ROWS             rows of coefficients of a patch at the first level
//   THREADS, BLOCKS  threads of a block, and blocks that a multiprocessor holds at once
//   CHANNELS_LAST    whether the channels of a pixel are contiguous
//   VECTOR           contiguous values that one load takes: pixels of a row, which one store writes
//                    too, or channels of a pixel
//   TILED            whether a tile is a part of a plane and has a halo, else it is a whole plane
//   BASE, BELOW      whether there is a base convolution, and an image below the deepest level
//   TILE_ROWS, TILE_COLUMNS    coefficients of a tile (list)
//   HALO             halo rows of the low band that are kept above the tile (list)
//   LEFT             halo columns of coefficients that are kept left of the tile (list)
//   LOW_ROWS, HIGH_ROWS        rows that are kept of the low band, and of the high bands (lists)
//   STRIDE           elements between rows (list)
//   PLANE            elements between planes
//   SEGMENT, BASE_SEGMENT      rows of coefficients that a thread sums for a weight gradient

#include "../common/scalars.cuh"

#ifndef SHARED
#define SHARED(name) extern __shared__ __align__(16) float name[]
#endif

// ---------------------------------------------------------------------------------------------
// Geometry

constexpr int K = KERNEL_SIZE, R = K / 2, KK = K * K;
constexpr int COLUMNS = R % 2 ? 1 : 2;        // Coefficients of a row that a thread makes at once.
constexpr int WINDOW = (4 + 2 * R + 3) / 4;   // Vectors of four columns and their neighbours.
constexpr int BASE_R = (R + 1) / 2;           // Halo of the base convolution, in coefficients.
constexpr int TAPS = (KK + 3) / 4 * 4;        // Elements from one band's taps to the next band's.
constexpr int BANDS = 1 + 4 * LEVELS;
constexpr int TAPS_PLANE = (BANDS * TAPS + 31) / 32 * 32 + 4;

__device__ constexpr int tile_rows[] = {TILE_H, TILE_ROWS};
__device__ constexpr int tile_columns[] = {TILE_W, TILE_COLUMNS};
__device__ constexpr int halo[] = {0, HALO};
__device__ constexpr int left_of[] = {0, LEFT};
__device__ constexpr int low_rows[] = {0, LOW_ROWS};
__device__ constexpr int high_rows[] = {0, HIGH_ROWS};
__device__ constexpr int stride_of[] = {0, STRIDE};

// The offset in a plane of a level's coefficients, low band first.
DEVICE constexpr int low_at(int level) {
  int at = 0;
  for (int l = 1; l < level; l++) at += (low_rows[l] + 3 * high_rows[l]) * stride_of[l];
  return at;
}

DEVICE constexpr int high_at(int level) { return low_at(level) + low_rows[level] * stride_of[level]; }

DEVICE constexpr int patches_across(int level) { return (tile_columns[level] + 3) / 4; }

// The place of the synthesis of one level; that of level LEVELS + 1 is the image below.
DEVICE constexpr int sum_stride(int level) { return 4 * ((tile_columns[level - 1] + 7) / 8 * 2); }

DEVICE constexpr int sum_rows(int level) {
  const int rows = (tile_rows[level - 1] + 1) / 2 * 2;
  const int most = (tile_rows[1] + ROWS - 1) / ROWS * ROWS;
  const int read = (most + (1 << (level - 2)) - 1) >> (level - 2);
  return rows > read ? rows : read;
}

DEVICE constexpr int sum_at(int level) {
  int at = low_at(LEVELS + 1);
  for (int l = 2; l < level; l++) at += sum_rows(l) * sum_stride(l);
  return at;
}

// The coefficients of a level that may be non-zero, as first row and column, rows and items of
// COLUMNS: a tile and its halo, or all of a whole plane.
DEVICE constexpr int first_row(int level) { return TILED ? 0 : halo[level]; }

DEVICE constexpr int first_column(int level) { return TILED ? 0 : left_of[level]; }

DEVICE constexpr int rows_of(int level) { return TILED ? low_rows[level] : tile_rows[level]; }

DEVICE constexpr int items_across(int level) {
  return TILED ? stride_of[level] / COLUMNS : (tile_columns[level] + COLUMNS - 1) / COLUMNS;
}

constexpr int PIXELS = CHANNELS_LAST ? 1 : VECTOR;    // Contiguous pixels of a row.
constexpr int TOGETHER = CHANNELS_LAST ? VECTOR : 1;  // Planes whose pixels are contiguous.

struct Level {
  int low, high, band, stride;  // Offsets of the first neighbour of the tile's first coefficient.
  int rows, across;
  int first_band;
};

DEVICE constexpr Level level_at(int l) {
  const int beside = left_of[l] - R, stride = stride_of[l];
  return {low_at(l) + (halo[l] - R) * stride + beside,
          high_at(l) + beside,
          high_rows[l] * stride,
          stride,
          tile_rows[l],
          patches_across(l),
          4 * l - 3};
}

// ---------------------------------------------------------------------------------------------
// Pixels

template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
  T at[COUNT];
};

template <int COUNT, typename T>
DEVICE Vector<T, COUNT> vector(const T* from) {
  return *reinterpret_cast<const Vector<T, COUNT>*>(from);
}

// Four neighbours in shared memory, which start R elements after a 16-byte boundary.
DEVICE void four(const float* from, float (&to)[4]) {
  constexpr int SIZE = R % 4 == 0 ? 4 : R % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < 4; i += SIZE) {
    const Vector<float, SIZE> part = vector<SIZE>(from + i);
#pragma unroll
    for (int j = 0; j < SIZE; j++) to[i + j] = part.at[j];
  }
}

// Four floats of shared memory. The load is volatile, so that the compiler keeps it in place: it
// would hoist all loads of a patch and run out of registers.
DEVICE Vector<float, 4> quad(const float* from) {
#ifdef __CUDACC__
  Vector<float, 4> result;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(result.at[0]), "=f"(result.at[1]), "=f"(result.at[2]), "=f"(result.at[3])
               : "r"(unsigned(__cvta_generic_to_shared(from))));
  return result;
#else
  return vector<4>(from);
#endif
}

// Four columns and their neighbours.
DEVICE void window(const float* from, float (&to)[4 * WINDOW]) {
#pragma unroll
  for (int i = 0; i < WINDOW; i++) {
    const Vector<float, 4> part = quad(from + 4 * i);
#pragma unroll
    for (int j = 0; j < 4; j++) to[4 * i + j] = part.at[j];
  }
}

struct Image {
  Offset plane, row;  // Elements from one plane, and from one row, to the next.
  int column;
  int height, width;
};

// The planes of a thread block, and the position of its tile.
struct Block {
  Offset first;  // Offset of the block's first plane in the tensor.
  int channel, planes;
  int top, left;
};

DEVICE Image image_of(int channels, int height, int width) {
#if CHANNELS_LAST
  return {1, Offset(width) * channels, channels, height, width};
#else
  return {Offset(channels) * height * width, width, 1, height, width};
#endif
}

// Consecutive blocks take neighbouring tiles of the same planes, so that L2 holds their halos.
DEVICE Block block_at(Offset at, int images, int channels, int height, int width) {
  const int across = (width + TILE_W - 1) / TILE_W, down = (height + TILE_H - 1) / TILE_H;
  const Offset size = Offset(height) * width;
  Block block;
#if CHANNELS_LAST
  const int groups = (channels + PLANES - 1) / PLANES;
  block.channel = int(at % groups) * PLANES;
  at /= groups;
#endif
  block.left = int(at % across) * TILE_W;
  at /= across;
  block.top = int(at % down) * TILE_H;
  at /= down;
#if CHANNELS_LAST
  block.planes = min(PLANES, channels - block.channel);
  block.first = at * size * channels + block.channel;
#else
  const int groups = (images + PLANES - 1) / PLANES, first = int(at % groups) * PLANES;
  block.channel = int(at / groups);
  block.planes = min(PLANES, images - first);
  block.first = (Offset(first) * channels + block.channel) * size;
#endif
  return block;
}

// ---------------------------------------------------------------------------------------------
// Analysis

// Stores the four bands of COLUMNS squares of pixels; `pixels` holds their upper, then lower row.
DEVICE void store_bands(const float (&pixels)[4 * COLUMNS], float* low, float* high, int band,
                        bool keep) {
  Vector<float, COLUMNS> bands[4];
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const float* top = pixels + 2 * j;
    const float* bottom = top + 2 * COLUMNS;
    const float sum0 = top[0] + top[1], sum1 = bottom[0] + bottom[1];
    const float difference0 = top[0] - top[1], difference1 = bottom[0] - bottom[1];
    bands[0].at[j] = sum0 + sum1;
    bands[1].at[j] = sum0 - sum1;
    bands[2].at[j] = difference0 + difference1;
    bands[3].at[j] = difference0 - difference1;
  }
  typedef Vector<float, COLUMNS> Columns;
  *reinterpret_cast<Columns*>(low) = bands[0];
  if (keep) {
#pragma unroll
    for (int s = 1; s < 4; s++) *reinterpret_cast<Columns*>(high + (s - 1) * band) = bands[s];
  }
}

// Stores the coefficients of one item of the analysis.
template <int LEVEL>
DEVICE void store_item(const float (&pixels)[4 * COLUMNS], float* plane, int row, int column) {
  constexpr int STEP = stride_of[LEVEL];
  const int high_row = row - halo[LEVEL] + R;
  store_bands(pixels, plane + low_at(LEVEL) + row * STEP + column,
              plane + high_at(LEVEL) + high_row * STEP + column, high_rows[LEVEL] * STEP,
              high_row >= 0 && high_row < high_rows[LEVEL]);
}

// Zeros whole planes, whose padding nothing else stores.
DEVICE void clear(float* shared, int planes) {
#pragma unroll 1
  for (int i = 4 * threadIdx.x; i < planes * PLANE; i += 4 * THREADS)
    *reinterpret_cast<Vector<float, 4>*>(shared + i) = {};
}

// Loads pixels up to `margin` around the tile and stores the coefficients of the first level. With
// `zeros` it clears the planes while the first loads are in flight.
DEVICE void load(const Scalar* __restrict__ x, const Image& image, const Block& block, int margin,
                 bool zeros, float* shared) {
  constexpr int ACROSS = items_across(1), DOWN = rows_of(1);
#if CHANNELS_LAST
  // Planes are the fastest axis: their pixels are contiguous in memory.
  constexpr int LINE = ACROSS * (PLANES / TOGETHER), LINES = DOWN;
#else
  constexpr int LINE = ACROSS, LINES = DOWN * PLANES;
#endif
  static_assert(LINE <= THREADS, "a thread has one column");
  constexpr int STEP = THREADS / LINE;
  constexpr int AT_ONCE = 4 / TOGETHER;  // Items whose loads are in flight together.
  constexpr int ITERATIONS = (LINES + AT_ONCE * STEP - 1) / (AT_ONCE * STEP);
  const int of_line = threadIdx.x % LINE, first_line = threadIdx.x / LINE;
  const int lines = first_line < STEP ? LINES : 0;
  const int item = CHANNELS_LAST ? of_line / (PLANES / TOGETHER) : of_line;
  const int item_column = first_column(1) + item * COLUMNS;
  const int item_plane = CHANNELS_LAST ? of_line % (PLANES / TOGETHER) * TOGETHER : 0;
  const int column = block.left + 2 * (item_column - left_of[1]);
  const int top = max(0, block.top - margin), left = max(0, block.left - margin);
  const int bottom = min(image.height, block.top + TILE_H + margin);
  const int right = min(image.width, block.left + TILE_W + margin);
  const Scalar* from = x + item_plane * image.plane + Offset(column) * image.column;
#pragma unroll 1
  for (int iteration = 0; iteration < ITERATIONS; iteration++) {
    const int first = iteration * AT_ONCE * STEP + first_line;
    float pixels[AT_ONCE][TOGETHER][4 * COLUMNS];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int line = first + u * STEP;
      const int plane = CHANNELS_LAST ? item_plane : line / DOWN;
      const int row = block.top + 2 * (first_row(1) + (CHANNELS_LAST ? line : line % DOWN) - halo[1]);
      const Scalar* at = from + row * image.row + (CHANNELS_LAST ? 0 : plane * image.plane);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const bool inside = plane < block.planes && line < lines && row + i >= top &&
                            row + i < bottom;
#pragma unroll
        for (int j = 0; j < 2 * COLUMNS; j += PIXELS) {
          Vector<Scalar, VECTOR> part = {};
          if (inside && column + j >= left && column + j < right)
            part = vector<VECTOR>(at + i * image.row + j * image.column);
#pragma unroll
          for (int k = 0; k < VECTOR; k++)
            pixels[u][k % TOGETHER][2 * COLUMNS * i + j + k % PIXELS] = number(part.at[k]);
        }
      }
    }
    if (zeros && iteration == 0) {
      clear(shared, PLANES);
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int line = first + u * STEP;
      const int plane = CHANNELS_LAST ? item_plane : line / DOWN;
      if (line >= lines) break;
#pragma unroll
      for (int t = 0; t < TOGETHER; t++)
        store_item<1>(pixels[u][t], shared + (plane + t) * PLANE,
                      first_row(1) + (CHANNELS_LAST ? line : line % DOWN), item_column);
    }
  }
}

// Computes the coefficients of a level from the low band of the level above, then synchronises.
template <int LEVEL>
DEVICE void analyse(float* shared, int planes) {
  constexpr int ACROSS = items_across(LEVEL), DOWN = rows_of(LEVEL);
  constexpr int STEP = stride_of[LEVEL - 1];
#pragma unroll 1
  for (int item = threadIdx.x; item < planes * DOWN * ACROSS; item += THREADS) {
    const int column = first_column(LEVEL) + item % ACROSS * COLUMNS;
    const int row = first_row(LEVEL) + item / ACROSS % DOWN;
    float* plane = shared + item / (ACROSS * DOWN) * PLANE;
    const int above = 2 * (row - halo[LEVEL]) + halo[LEVEL - 1];
    const int beside = 2 * (column - left_of[LEVEL]) + left_of[LEVEL - 1];
    const float* from = plane + low_at(LEVEL - 1) + above * STEP + beside;
    float pixels[4 * COLUMNS];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const bool inside = above + i >= 0 && above + i < low_rows[LEVEL - 1];
#pragma unroll
      for (int j = 0; j < 2 * COLUMNS; j += COLUMNS) {
        Vector<float, COLUMNS> part = {};
        if (inside && beside + j >= 0 && beside + j < STEP)
          part = vector<COLUMNS>(from + i * STEP + j);
#pragma unroll
        for (int k = 0; k < COLUMNS; k++) pixels[2 * COLUMNS * i + j + k] = part.at[k];
      }
    }
    store_item<LEVEL>(pixels, plane, row, column);
  }
  __syncthreads();
}

DEVICE void analyse_all(float* shared, int planes) {
#if LEVELS > 1
  analyse<2>(shared, planes);
#endif
#if LEVELS > 2
  analyse<3>(shared, planes);
#endif
#if LEVELS > 3
  analyse<4>(shared, planes);
#endif
#if LEVELS > 4
  analyse<5>(shared, planes);
#endif
}

// ---------------------------------------------------------------------------------------------
// Forward

struct Taps {
  const float* of[LEVELS + 1];  // Taps of the base and of each level, `[C, 1 or 4, K, K]`.
};

// Copies the taps of a block's channels to shared memory, times the factors of the transforms.
DEVICE void load_taps(const Taps& taps, const Block& block, int transpose, float* to) {
  const int channels = CHANNELS_LAST ? block.planes : 1;
#pragma unroll 1
  for (int item = threadIdx.x; item < channels * 4 * KK; item += THREADS) {
    // An item is the same tap and band of every level, and for the first band also of the base.
    const int tap = item % KK, band = item / KK % 4, plane = item / (4 * KK);
    const Offset channel = block.channel + plane;
    float values[LEVELS + 1];
    values[0] = BASE && band == 0 ? taps.of[0][channel * KK + tap] : 0.0f;
#pragma unroll
    for (int l = 1; l <= LEVELS; l++) values[l] = taps.of[l][(channel * 4 + band) * KK + tap];
    float* at = to + plane * TAPS_PLANE + (transpose ? KK - 1 - tap : tap);
    if (band == 0) at[0] = 0.25f * values[0];
#pragma unroll
    for (int l = 1; l <= LEVELS; l++)
      at[(4 * l - 3 + band) * TAPS] = values[l] / float(1 << 2 * l);
  }
}

DEVICE void registers(const float* taps, float (&to)[TAPS]) {
#pragma unroll
  for (int i = 0; i < TAPS; i += 4) {
    const Vector<float, 4> part = vector<4>(taps + i);
#pragma unroll
    for (int j = 0; j < 4; j++) to[i + j] = part.at[j];
  }
}

// Adds one filtered band to a patch of COUNT x 4 coefficients.
template <int COUNT>
DEVICE void filter(const float* from, int stride, const float* shared_taps, float (&sums)[COUNT][4]) {
  float taps[TAPS];
  registers(shared_taps, taps);
#pragma unroll
  for (int d = 0; d < COUNT + 2 * R; d++) {
    float values[4 * WINDOW];
    window(from + d * stride, values);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (d < i || d - i >= K) continue;
#pragma unroll
      for (int e = 0; e < K; e++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i][j] += values[j + e] * taps[(d - i) * K + e];
      }
    }
  }
}

// The synthesis of a patch from its four filtered bands; `low` holds the low band's initial values.
template <int COUNT>
DEVICE void filter_level(const float* plane, const Level& level, int row, int column,
                         const float* taps, float (&low)[COUNT][4], float (&pixels)[2 * COUNT][8]) {
  const int at = row * level.stride + column;
  taps += level.first_band * TAPS;
  float vertical[COUNT][4] = {}, horizontal[COUNT][4] = {}, diagonal[COUNT][4] = {};
  filter<COUNT>(plane + level.low + at, level.stride, taps, low);
  filter<COUNT>(plane + level.high + at, level.stride, taps + TAPS, vertical);
  filter<COUNT>(plane + level.high + level.band + at, level.stride, taps + 2 * TAPS, horizontal);
  filter<COUNT>(plane + level.high + 2 * level.band + at, level.stride, taps + 3 * TAPS, diagonal);
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float over = low[i][j] + vertical[i][j], under = low[i][j] - vertical[i][j];
      const float beside0 = horizontal[i][j] + diagonal[i][j];
      const float beside1 = horizontal[i][j] - diagonal[i][j];
      pixels[2 * i][2 * j] = over + beside0;
      pixels[2 * i][2 * j + 1] = over - beside0;
      pixels[2 * i + 1][2 * j] = under + beside1;
      pixels[2 * i + 1][2 * j + 1] = under - beside1;
    }
  }
}

// A row of pixels of a patch and their neighbours, four times as large, from its coefficients.
template <int LENGTH>
DEVICE void pixel_row(const float (&bands)[4][LENGTH], int first, int count, int bottom,
                      float* pixels) {
#pragma unroll
  for (int j = 0; j < count; j++) {
    const int at = first + j;
    const float low = bottom ? bands[0][at] - bands[1][at] : bands[0][at] + bands[1][at];
    const float high = bottom ? bands[2][at] - bands[3][at] : bands[2][at] + bands[3][at];
    pixels[2 * j] = low + high;
    pixels[2 * j + 1] = low - high;
  }
}

// Adds the base convolution to a patch of pixels.
DEVICE void filter_base(const float* plane, int row, int column, const float* shared_taps,
                        float (&sums)[2 * ROWS][8]) {
  constexpr Level level = level_at(1);
  float taps[TAPS];
  registers(shared_taps, taps);
  const float* low = plane + level.low + (row + R) * level.stride + column;
  const float* high = plane + level.high + (row + R) * level.stride + column;
#pragma unroll
  for (int d = -BASE_R; d < ROWS + BASE_R; d++) {
    float bands[4][4 * WINDOW];
    window(low + d * level.stride, bands[0]);
#pragma unroll
    for (int s = 1; s < 4; s++)
      window(high + (s - 1) * level.band + d * level.stride, bands[s]);
#pragma unroll
    for (int bottom = 0; bottom < 2; bottom++) {
      float pixels[2 * (4 + 2 * BASE_R)];
      pixel_row(bands, R - BASE_R, 4 + 2 * BASE_R, bottom, pixels);
#pragma unroll
      for (int i = 0; i < 2 * ROWS; i++) {
        const int t = 2 * d + bottom - i + R;
        if (t < 0 || t >= K) continue;
#pragma unroll
        for (int e = 0; e < K; e++) {
#pragma unroll
          for (int j = 0; j < 8; j++)
            sums[i][j] += pixels[j + e - R + 2 * BASE_R] * taps[t * K + e];
        }
      }
    }
  }
}

// Filters and synthesises each level from the second on into a sum of its own, all at once: no
// level's sum depends on another's.
DEVICE void filter_deep(float* shared, const float* shared_taps, int planes) {
  int end[LEVELS + 1];
  end[1] = 0;
#pragma unroll
  for (int l = 2; l <= LEVELS; l++) end[l] = end[l - 1] + planes * tile_rows[l] * patches_across(l);
#pragma unroll 1
  for (int item = threadIdx.x; item < end[LEVELS]; item += THREADS) {
    Level level = level_at(LEVELS < 2 ? 1 : 2);
    int at = item, to = sum_at(2), step = sum_stride(2);
#pragma unroll
    for (int l = 3; l <= LEVELS; l++) {
      if (item < end[l - 1]) continue;
      level = level_at(l);
      at = item - end[l - 1];
      to = sum_at(l);
      step = sum_stride(l);
    }
    const int index = at % planes, patch = at / planes;
    const int row = patch / level.across, column = 4 * (patch % level.across);
    float* plane = shared + index * PLANE;
    float low[1][4] = {}, pixels[2][8];
    filter_level<1>(plane, level, row, column, shared_taps + (CHANNELS_LAST ? index * TAPS_PLANE : 0),
                    low, pixels);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const Vector<float, 4> part = {{pixels[i][j], pixels[i][j + 1], pixels[i][j + 2], pixels[i][j + 3]}};
        *reinterpret_cast<Vector<float, 4>*>(plane + to + (2 * row + i) * step + 2 * column + j) = part;
      }
    }
  }
}

// Loads the image below the deepest level, times the factor of the synthesis down to it.
DEVICE void load_below(const float* __restrict__ below, const Block& block, int images, int channels,
                       int height, int width, float* shared) {
  constexpr int LEVEL = LEVELS + 1, SIDE = 1 << LEVELS;
  constexpr int ACROSS = tile_columns[LEVELS], DOWN = tile_rows[LEVELS];
  const int rows = (height + SIDE - 1) / SIDE, columns = (width + SIDE - 1) / SIDE;
  const Image image = image_of(channels, rows, columns);
  const int top = block.top / SIDE, left = block.left / SIDE;
  const Offset size = Offset(height) * width;
#if CHANNELS_LAST
  const Offset first = block.first / (size * channels) * rows * columns * channels + block.channel;
#else
  const Offset first = block.first / size * rows * columns;
#endif
#pragma unroll 1
  for (int item = threadIdx.x; item < block.planes * DOWN * ACROSS; item += THREADS) {
#if CHANNELS_LAST
    const int plane = item % block.planes, pixel = item / block.planes;
#else
    const int plane = item / (DOWN * ACROSS), pixel = item % (DOWN * ACROSS);
#endif
    const int row = pixel / ACROSS, column = pixel % ACROSS;
    float value = 0.0f;
    if (top + row < rows && left + column < columns)
      value = below[first + plane * image.plane + (top + row) * image.row +
                    Offset(left + column) * image.column];
    shared[plane * PLANE + sum_at(LEVEL) + row * sum_stride(LEVEL) + column] = value / SIDE;
  }
}

#if defined(FORWARD)

// One thread block of the forward: one tile of y, which has x's shape. Taps are `[C, 1 or 4, K, K]`,
// the bias is `[C]` or null.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wtconv_forward(const Scalar* __restrict__ x, const float* __restrict__ below,
               const float* __restrict__ base, const float* __restrict__ taps1,
               const float* __restrict__ taps2, const float* __restrict__ taps3,
               const float* __restrict__ taps4, const float* __restrict__ taps5,
               const float* __restrict__ bias, int images, int channels, int height, int width,
               int transpose, Scalar* __restrict__ y) {
  SHARED(shared);
  float* shared_taps = shared + PLANES * PLANE;
  const Image image = image_of(channels, height, width);
  const Block block = block_at(blockIdx.x, images, channels, height, width);

  load(x + block.first, image, block, 2 * halo[1], !TILED, shared);
  const Taps taps = {base, taps1,
#if LEVELS > 1
                     taps2,
#endif
#if LEVELS > 2
                     taps3,
#endif
#if LEVELS > 3
                     taps4,
#endif
#if LEVELS > 4
                     taps5,
#endif
  };
  load_taps(taps, block, transpose, shared_taps);
#if BELOW
  load_below(below, block, images, channels, height, width, shared);
#endif
  __syncthreads();
  analyse_all(shared, block.planes);
#if LEVELS > 1
  filter_deep(shared, shared_taps, block.planes);
  __syncthreads();
#endif

  constexpr Level level = level_at(1);
  constexpr int DOWN = (tile_rows[1] + ROWS - 1) / ROWS;
  constexpr int ITEMS = PLANES * DOWN * level.across, ITERATIONS = (ITEMS + THREADS - 1) / THREADS;
#pragma unroll 1
  for (int iteration = 0; iteration < ITERATIONS; iteration++) {
    const int item = iteration * THREADS + threadIdx.x;
    const int index = item % PLANES, patch = item / PLANES;
    const int row = patch / level.across * ROWS, column = 4 * (patch % level.across);
    const int top = block.top + 2 * row, left = block.left + 2 * column;
    if (item >= ITEMS || index >= block.planes || top >= height || left >= width) continue;
    const float* plane = shared + index * PLANE;
    const float* plane_taps = shared_taps + (CHANNELS_LAST ? index * TAPS_PLANE : 0);
    float low[ROWS][4] = {}, pixels[2 * ROWS][8];
#pragma unroll
    for (int l = 2; l <= LEVELS + BELOW; l++) {
      const int shift = l - 2;
      const float* from = plane + sum_at(l) + (column >> shift);
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const float* part = from + ((row + i) >> shift) * sum_stride(l);
#pragma unroll
        for (int j = 0; j < 4; j++) low[i][j] += part[j >> shift];
      }
    }
    filter_level<ROWS>(plane, level, row, column, plane_taps, low, pixels);
    if (BASE) filter_base(plane, row, column, plane_taps, pixels);
    const float offset = bias == nullptr ? 0.0f : bias[block.channel + (CHANNELS_LAST ? index : 0)];
    Scalar* to = y + block.first + index * image.plane + top * image.row + Offset(left) * image.column;
#pragma unroll
    for (int i = 0; i < 2 * ROWS; i++) {
      if (top + i >= height) break;
      Scalar* at = to + i * image.row;
#pragma unroll
      for (int j = 0; j < 8; j += PIXELS) {
        if (left + j >= width) break;
        Vector<Scalar, PIXELS> part;
#pragma unroll
        for (int k = 0; k < PIXELS; k++) part.at[k] = scalar(pixels[i][j + k] + offset);
        *reinterpret_cast<Vector<Scalar, PIXELS>*>(at) = part;
        at += PIXELS * image.column;
      }
    }
  }
}

#elif defined(LOW)

// The low band of level LEVELS of x in float32, one thread a coefficient.
extern "C" __global__ void __launch_bounds__(THREADS)
wtconv_low(const Scalar* __restrict__ x, int images, int channels, int height, int width,
           float* __restrict__ y) {
  constexpr int SIDE = 1 << LEVELS;
  const int rows = (height + SIDE - 1) / SIDE, columns = (width + SIDE - 1) / SIDE;
  const Offset at = Offset(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= Offset(images) * channels * rows * columns) return;
  Offset rest = at;
  const Image image = image_of(channels, height, width);
#if CHANNELS_LAST
  const int channel = int(rest % channels);
  rest /= channels;
#endif
  const int column = int(rest % columns) * SIDE;
  rest /= columns;
  const int row = int(rest % rows) * SIDE;
  rest /= rows;
#if CHANNELS_LAST
  const Scalar* first = x + rest * height * image.row + channel + row * image.row;
#else
  const Scalar* first = x + rest * height * image.row + row * image.row;
#endif
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < SIDE; i++) {
    if (row + i >= height) break;
#pragma unroll
    for (int j = 0; j < SIDE; j += PIXELS) {
      if (column + j >= width) break;
      const Offset beside = Offset(column + j) * image.column;
      const Vector<Scalar, PIXELS> part = vector<PIXELS>(first + i * image.row + beside);
#pragma unroll
      for (int k = 0; k < PIXELS; k++) sum += number(part.at[k]);
    }
  }
  y[at] = sum / SIDE;
}

#else

// ---------------------------------------------------------------------------------------------
// Weight gradient

// Adds to each tap's accumulator the coefficients of x times those of dy, of one band. The rows of dy
// enter a ring of K rows in registers, so that each row of x is loaded once for all K of them.
DEVICE void correlate_band(const float* x, const float* dy, int stride, int rows, float (&sums)[KK]) {
  float ring[K][4] = {};
#pragma unroll 1
  for (int first = 0; first < rows + 2 * R; first += K) {
#pragma unroll
    for (int u = 0; u < K; u++) {
      const int d = first + u;
      if (d >= rows + 2 * R) break;
      float values[4 * WINDOW];
      window(x + d * stride, values);
      if (d < rows) {
        four(dy + d * stride, ring[u]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) ring[u][j] = 0.0f;
      }
#pragma unroll
      for (int t = 0; t < K; t++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
          for (int e = 0; e < K; e++) sums[t * K + e] += values[j + e] * ring[(u - t + K) % K][j];
        }
      }
    }
  }
}

// The same for pixels; `x` and `dy` point at the first neighbour of the segment.
DEVICE void correlate_base(const float* x, const float* dy, int rows, float (&sums)[KK]) {
  constexpr Level level = level_at(1);
  constexpr int BANDS_AT[4] = {level.low, level.high, level.high + level.band,
                               level.high + 2 * level.band};
  float ring[K][8] = {};
#pragma unroll 1
  for (int first = 0; first < 2 * rows + 2 * R; first += 2 * K) {
#pragma unroll
    for (int u = 0; u < 2 * K; u++) {
      const int d = first + u;
      if (d >= 2 * rows + 2 * R) break;
      // Row d of the segment's pixels with their neighbours, and row d of dy.
      const int bottom = (u + R) % 2;
      const int row = R + (d - R - bottom) / 2;
      float bands[4][4 * WINDOW], pixels[2 * (4 + 2 * BASE_R)];
#pragma unroll
      for (int s = 0; s < 4; s++) window(x + BANDS_AT[s] + row * level.stride, bands[s]);
      pixel_row(bands, R - BASE_R, 4 + 2 * BASE_R, bottom, pixels);
      if (d < 2 * rows) {
        float other[4][4];
#pragma unroll
        for (int s = 0; s < 4; s++)
          four(dy + BANDS_AT[s] + (R + d / 2) * level.stride + R, other[s]);
        pixel_row(other, 0, 4, u % 2, ring[u % K]);
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++) ring[u % K][j] = 0.0f;
      }
#pragma unroll
      for (int t = 0; t < K; t++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
          for (int e = 0; e < K; e++)
            sums[t * K + e] += pixels[j + e - R + 2 * BASE_R] * ring[(u - t + 2 * K) % K][j];
        }
      }
    }
  }
}

constexpr int WARP = 32;

DEVICE constexpr int segments(int level) { return (tile_rows[level] + SEGMENT - 1) / SEGMENT; }

constexpr int BASE_SEGMENTS = (tile_rows[1] + BASE_SEGMENT - 1) / BASE_SEGMENT;

// The first thread of a level's threads, ordered by bands, segments, strips and planes, planes
// fastest. The base's threads come first and fill whole warps, since they run other code.
DEVICE constexpr int first_role(int level) {
  if (level == 0) return 0;
  const int base = BASE ? PLANES * patches_across(1) * BASE_SEGMENTS : 0;
  int at = (base + WARP - 1) / WARP * WARP;
  for (int l = 1; l < level; l++) at += PLANES * patches_across(l) * segments(l) * 4;
  return at;
}

// One persistent thread block of the weight gradient. `sums [programs, C, 1 + 4 * LEVELS, K * K]`
// holds each program's share of the taps' gradients.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wtconv_weights(const Scalar* __restrict__ x, const Scalar* __restrict__ dy, int images,
               int channels, int height, int width, int programs, float* __restrict__ sums) {
  SHARED(shared);
  float* other = shared + PLANES * PLANE;
  const Image image = image_of(channels, height, width);
  const Offset tiles = Offset((width + TILE_W - 1) / TILE_W) * ((height + TILE_H - 1) / TILE_H);
#if CHANNELS_LAST
  const int groups = (channels + PLANES - 1) / PLANES, group = blockIdx.x % groups;
  const int program = blockIdx.x / groups;
  const Offset iterations = tiles * images;
#else
  const int channel = blockIdx.x % channels, program = blockIdx.x / channels;
  const Offset iterations = tiles * ((images + PLANES - 1) / PLANES);
#endif

  int role = int(threadIdx.x), l = 0;
#pragma unroll
  for (int i = 1; i <= LEVELS; i++) {
    if (int(threadIdx.x) >= first_role(i)) {
      role = int(threadIdx.x) - first_role(i);
      l = i;
    }
  }
  Level level = level_at(1);
  int rows = l == 0 ? BASE_SEGMENT : SEGMENT, count = l == 0 ? BASE_SEGMENTS : segments(1);
#pragma unroll
  for (int i = 2; i <= LEVELS; i++) {
    if (l == i) {
      level = level_at(i);
      count = segments(i);
    }
  }
  const int plane = role % PLANES, strip = role / PLANES % level.across;
  const int segment = role / (PLANES * level.across) % count;
  const int band = role / (PLANES * level.across * count);
  const int from = segment * rows;
  rows = min(rows, level.rows - from);
  const bool works = band < (l == 0 ? int(BASE) : 4);
  int at = plane * PLANE + from * level.stride + 4 * strip;
  if (l > 0) at += band == 0 ? level.low : level.high + (band - 1) * level.band;

  float found[KK] = {};
  Block block;
#pragma unroll 1
  for (Offset iteration = program; iteration < iterations; iteration += programs) {
#if CHANNELS_LAST
    block = block_at(iteration * groups + group, images, channels, height, width);
#else
    block = block_at(channel * iterations + iteration, images, channels, height, width);
#endif
    const bool zeros = !TILED && iteration == program;
    load(x + block.first, image, block, 2 * halo[1], zeros, shared);
    // dy's halo belongs to the neighbouring tiles, so it counts as zero here.
    load(dy + block.first, image, block, 0, zeros, other);
    __syncthreads();
    // The planes of dy follow those of x in shared memory.
    analyse_all(shared, 2 * PLANES);
    if (works) {
      if (l == 0) {
        correlate_base(shared + at, other + at, rows, found);
      } else {
        correlate_band(shared + at, other + at + R * level.stride + R, level.stride, rows, found);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int t = 0; t < KK; t++) shared[threadIdx.x * KK + t] = found[t];
  __syncthreads();
  // The order is fixed, so results are bitwise reproducible.
  constexpr int PARTS = CHANNELS_LAST ? PLANES : 1;
#pragma unroll 1
  for (int item = threadIdx.x; item < PARTS * BANDS * KK; item += THREADS) {
    const int tap = item % KK, slot = item / KK % BANDS, part = item / (KK * BANDS);
    const int of = (slot + 3) / 4;
    int members = PLANES * patches_across(1) * BASE_SEGMENTS, first = 0;
    float factor = 1.0f / 16;
#pragma unroll
    for (int i = 1; i <= LEVELS; i++) {
      if (of != i) continue;
      members = PLANES * patches_across(i) * segments(i);
      first = first_role(i) + (slot + 3) % 4 * members;
      factor = 1.0f / float(1 << 2 * i);
    }
    float sum = 0.0f;
    if (slot > 0 || BASE) {
      for (int i = part; i < members; i += PARTS) sum += shared[(first + i) * KK + tap];
    }
#if CHANNELS_LAST
    const int channel = group * PLANES + part;
    if (channel >= channels) continue;
#endif
    sums[((Offset(program) * channels + channel) * BANDS + slot) * KK + tap] = factor * sum;
  }
}

#endif
