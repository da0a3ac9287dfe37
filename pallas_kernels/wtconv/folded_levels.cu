// Some levels of the wavelet convolution of small 16-bit images in one launch, for NVRTC.
//
// A thread block has some channels of whole images of all levels in shared memory, with zeros beside
// them, and a warp a group of channels of them: it makes the means of each level from those of the
// level above, then from the deepest level on what each adds to the level above, in the place of the
// means. Sums do not wait in registers: 16 blocks of four columns of any pairs of rows are a product
// for each pair of rows that they reach. So there are registers for more warps, and products of many
// rows of M where images are narrow.
//
// The host defines these macros, beside those of `folded.cuh`:
//   LEVELS           the number of levels
//   HEIGHT, WIDE     of the images of the first of them
//   HALVED           whether these are the means of the squares of x, 0: they are x
//   HIGH, BROAD      rows and columns of x
//   IMAGES           images of a thread block
//   BANDS            1 for the kernel that stores the means of all levels, and does no more

#include "folded.cuh"
#include "folded_means.cuh"

static_assert(TOGETHER % VECTOR == 0, "");

// The images of a level in shared memory. The columns before a line are those after the line before.
template <int LEVEL>
struct Level {
  static constexpr int ROWS = (HEIGHT + (1 << LEVEL) - 1) >> LEVEL;
  static constexpr int COLUMNS = (WIDE + (1 << LEVEL) - 1) >> LEVEL;
  static constexpr int PAIRS = (ROWS + 1) / 2, SIDE = (COLUMNS + 3) / 4;  // SIDE in blocks.
  static constexpr int LINE = 4 * SIDE + HALO, IMAGE = 2 * PAIRS * LINE;
  static constexpr int GROUP_BYTES = group_bytes(HALO + IMAGES * IMAGE);
  static constexpr int BYTES = GROUPS * GROUP_BYTES;

  DEVICE static constexpr int place() {
    if constexpr (LEVEL == 0) {
      return 0;
    } else {
      return Level<LEVEL - 1>::place() + Level<LEVEL - 1>::BYTES;
    }
  }

  // The place of a pixel of a group.
  DEVICE static int at(int group, int image, int row, int column) {
    return place() + group * GROUP_BYTES +
           2 * GROUP * (HALO + image * IMAGE + row * LINE + column);
  }
};

// Zeros in place of a pair of rows that is not in the image, behind all levels.
constexpr int ZEROS = Level<LEVELS - 1>::place() + Level<LEVELS - 1>::BYTES;
constexpr int END = ZEROS + (2 * GROUP * 2 * Level<0>::LINE + 15) / 16 * 16;

// What of a piece is of one group.
constexpr int MOST = VECTOR < GROUP ? VECTOR : GROUP;
struct alignas(2 * MOST) Part {
  Scalar at[MOST];
};

// Brings a thread's share of the images into shared memory, VECTOR channels of a pixel at once.
DEVICE void load(const Scalar* __restrict__ x, int first, int image, int count, int channels,
                 unsigned char* shared) {
  typedef Level<0> Here;
  constexpr int PIECES = TOGETHER / VECTOR, ITEMS = IMAGES * HEIGHT * WIDE * PIECES;
#pragma unroll 4
  for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
    const int piece = item % PIECES * VECTOR, pixel = item / PIECES;
    const int column = pixel % WIDE, row = pixel / WIDE % HEIGHT, which = pixel / (WIDE * HEIGHT);
    if (first + piece >= channels || image + which >= count) continue;
    const Scalar* from = x + Offset(image + which) * HIGH * BROAD * channels + first + piece;
    const Piece found = HALVED
                            ? means_at(from, row, column, HIGH, BROAD, channels)
                            : *reinterpret_cast<const Piece*>(from + (row * WIDE + column) * channels);
#pragma unroll
    for (int i = 0; i < VECTOR; i += MOST) {
      Part part;
#pragma unroll
      for (int j = 0; j < MOST; j++) part.at[j] = found.at[i + j];
      const int channel = piece + i;
      *reinterpret_cast<Part*>(shared + Here::at(channel / GROUP, which, row, column) +
                               2 * (channel % GROUP)) = part;
    }
  }
}

// The same the other way, of any level.
template <int LEVEL>
DEVICE void store(const unsigned char* shared, int first, int image, int count, int channels,
                  Scalar* __restrict__ y) {
  typedef Level<LEVEL> Here;
  constexpr int ROWS = Here::ROWS, COLUMNS = Here::COLUMNS;
  constexpr int PIECES = TOGETHER / VECTOR, ITEMS = IMAGES * ROWS * COLUMNS * PIECES;
#pragma unroll 4
  for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
    const int piece = item % PIECES * VECTOR, pixel = item / PIECES;
    const int column = pixel % COLUMNS, row = pixel / COLUMNS % ROWS;
    const int which = pixel / (COLUMNS * ROWS);
    if (first + piece >= channels || image + which >= count) continue;
    Piece found;
#pragma unroll
    for (int i = 0; i < VECTOR; i += MOST) {
      const int channel = piece + i;
      const Part part = *reinterpret_cast<const Part*>(
          shared + Here::at(channel / GROUP, which, row, column) + 2 * (channel % GROUP));
#pragma unroll
      for (int j = 0; j < MOST; j++) found.at[i + j] = part.at[j];
    }
    *reinterpret_cast<Piece*>(y + (Offset(image) * ROWS * COLUMNS + pixel) * channels + first +
                              piece) = found;
  }
}

// Makes the means of the level above, and those of the levels below them.
template <int LEVEL>
DEVICE void make_means(unsigned char* shared) {
  typedef Level<LEVEL> Here;
  typedef Level<LEVEL - 1> Above;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 2
  for (int i = lane; i < IMAGES * Here::ROWS * Here::COLUMNS; i += 32) {
    const int column = i % Here::COLUMNS, row = i / Here::COLUMNS % Here::ROWS;
    const int image = i / (Here::COLUMNS * Here::ROWS);
    Channels squares[4], means;
#pragma unroll
    for (int k = 0; k < 4; k++)
      squares[k] =
          channels_at(shared + Above::at(warp, image, 2 * row + k / 2, 2 * column + k % 2));
#pragma unroll
    for (int c = 0; c < GROUP / 2; c++) {
      float both[2];
#pragma unroll
      for (int j = 0; j < 2; j++)
        both[j] = mean(squares[0].words[c] >> 16 * j, squares[1].words[c] >> 16 * j,
                       squares[2].words[c] >> 16 * j, squares[3].words[c] >> 16 * j);
      means.words[c] = packed(both[0], both[1]);
    }
    *reinterpret_cast<Channels*>(shared + Here::at(warp, image, row, column)) = means;
  }
  __syncwarp();
  if constexpr (LEVEL + 1 < LEVELS) make_means<LEVEL + 1>(shared);
}

DEVICE constexpr int power_of_two(int least) { return least > 1 ? 2 * power_of_two((least + 1) / 2) : 1; }

// Makes what a level adds, after all below it.
template <int LEVEL>
DEVICE void make_level(const unsigned* __restrict__ taps, const float* __restrict__ bias, int level,
                       int first, int channels, unsigned char* shared) {
  typedef Level<LEVEL> Here;
  if constexpr (LEVEL + 1 < LEVELS)
    make_level<LEVEL + 1>(taps, nullptr, level, first, channels, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Matrix matrix;
  load_taps(taps, level + LEVEL, first, channels, matrix);
  float offsets[GROUP];
#pragma unroll
  for (int c = 0; c < GROUP; c++)
    offsets[c] = first + c < channels && bias != nullptr ? bias[first + c] : 0.0f;

  // A pair of rows has ACROSS of the 16 blocks, the last of which may not be in the image. Then
  // lanes read another one, and their results are not kept.
  constexpr int ACROSS = power_of_two(Here::SIDE), DOWN = 16 / ACROSS;
  static_assert(ACROSS <= 16, "images are of at most 16 blocks");
  constexpr int UNITS = IMAGES * Here::PAIRS;  // Pairs of rows of all images.
  constexpr int TIMES = (UNITS + DOWN - 1) / DOWN;
  // Results stay in registers until no later product reads what is in their place.
  constexpr int WAITING = (R + DOWN - 1) / DOWN;
  constexpr int PAIR = 2 * GROUP * 2 * Here::LINE;
  const int block = lane / 4 % ACROSS, column = min(block, Here::SIDE - 1) * 4 + lane % 4;
  const int own = Here::at(warp, 0, 0, column) - 2 * GROUP * HALO;
  Channels waiting[WAITING + 1][2][2];
#pragma unroll 1
  for (int time = 0; time < TIMES + WAITING; time++) {
    if (time < TIMES) {
      int pair[2], from[2], below[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int unit = min(time * DOWN + (lane / 4 + 8 * h) / ACROSS, UNITS - 1);
        pair[h] = unit % Here::PAIRS;
        from[h] = own + unit * PAIR;
        if constexpr (LEVEL + 1 < LEVELS)
          below[h] = Level<LEVEL + 1>::at(warp, unit / Here::PAIRS, pair[h], column / 2);
      }
      float sums[GROUP][4] = {};
#pragma unroll
      for (int i = 0; i < REACHED; i++) {
        Channels pixels[2][2][PARTS];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int other = pair[h] + i - R;
          const int at = other >= 0 && other < Here::PAIRS ? from[h] + (i - R) * PAIR : ZEROS;
#pragma unroll
          for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int part = 0; part < PARTS; part++)
              pixels[h][r][part] =
                  channels_at(shared + at + r * PAIR / 2 + part * 2 * GROUP * 4);
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
          multiply_parts(sums[c], values, matrix[c] + i * PARTS, sums[c]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Channels under = {};
        if constexpr (LEVEL + 1 < LEVELS) under = channels_at(shared + below[h]);
#pragma unroll
        for (int r = 0; r < 2; r++) waiting[WAITING][h][r] = finished(sums, 2 * h + r, offsets, under);
      }
    }
    __syncwarp();
    const int done = time - WAITING;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int unit = done * DOWN + (lane / 4 + 8 * h) / ACROSS;
      const bool kept = done >= 0 && unit < UNITS && block < Here::SIDE;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (kept)
          *reinterpret_cast<Channels*>(shared + own + 2 * GROUP * HALO + unit * PAIR +
                                       r * PAIR / 2) = waiting[0][h][r];
#pragma unroll
        for (int i = 0; i < WAITING; i++) waiting[i][h][r] = waiting[i + 1][h][r];
      }
    }
    __syncwarp();
  }
}

// The channels and images of a thread block.
struct Share {
  int first, image;

  DEVICE static Share mine(int channels) {
    const int chunks = (channels + TOGETHER - 1) / TOGETHER;
    return {int(blockIdx.x) % chunks * TOGETHER, int(blockIdx.x) / chunks * IMAGES};
  }
};

// Brings a thread block's images into shared memory, and makes the means of all levels.
DEVICE void begin(const Scalar* __restrict__ x, const Share& share, int count, int channels,
                  unsigned char* shared) {
#pragma unroll 1
  for (int at = 16 * int(threadIdx.x); at < END; at += 16 * THREADS)
    *reinterpret_cast<Eight*>(shared + at) = {};
  __syncthreads();
  load(x, share.first, share.image, count, channels, shared);
  __syncthreads();
  if constexpr (LEVELS > 1) make_means<1>(shared);
}

#if BANDS

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
folded_bands(const Scalar* __restrict__ x, int count, int channels,
#if LEVELS > 1
             Scalar* __restrict__ y0,
#endif
#if LEVELS > 2
             Scalar* __restrict__ y1,
#endif
#if LEVELS > 3
             Scalar* __restrict__ y2,
#endif
             Scalar* __restrict__ last) {
  static_assert(LEVELS <= 4, "");
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const Share share = Share::mine(channels);
  begin(x, share, count, channels, shared);
  __syncthreads();
#if LEVELS > 1
  store<0>(shared, share.first, share.image, count, channels, y0);
#endif
#if LEVELS > 2
  store<1>(shared, share.first, share.image, count, channels, y1);
#endif
#if LEVELS > 3
  store<2>(shared, share.first, share.image, count, channels, y2);
#endif
  store<LEVELS - 1>(shared, share.first, share.image, count, channels, last);
}

#else

// All levels from `level` on of IMAGES images and TOGETHER channels in each block. Taps are those of
// all levels; `bias [C]`, which may be null, is added to all pixels.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
folded_levels(const Scalar* __restrict__ x, const unsigned* __restrict__ taps,
              const float* __restrict__ bias, int level, int count, int channels,
              Scalar* __restrict__ y) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const Share share = Share::mine(channels);
  begin(x, share, count, channels, shared);
  const int own = share.first + GROUP * (int(threadIdx.x) / 32);
  make_level<0>(taps, bias, level, own, channels, shared);
  __syncthreads();
  store<0>(shared, share.first, share.image, count, channels, y);
}

#endif
