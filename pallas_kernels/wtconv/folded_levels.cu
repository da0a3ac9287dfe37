// Some levels of the wavelet convolution of small 16-bit images in one launch, for NVRTC.
//
// A thread block has some channels of whole images of all levels in shared memory, with zeros beside
// them, and a warp a group of channels of them: it makes the means of each level from those of the
// level above, then from the deepest level on what each adds to the level above, in the place of the
// means. Sums do not wait in registers: 16 blocks of four columns of any pairs of rows are a product
// for each pair of rows that they reach. So there are registers for more warps, and products of many
// rows of M where images are narrow. Channels lie one after the other, and the two rows of a pair in
// the two halves of a word, so that four columns are a row of a product's matrix.
//
// The host defines these macros, beside those of `folded.cuh`:
//   LEVELS           the number of levels
//   HEIGHT, WIDE     of the images of the first of them
//   HALVED           whether these are the means of the squares of x, 0: they are x
//   HIGH, BROAD      rows and columns of x
//   FIRST            the number of the first of them among all levels
//   Y_ROWS, Y_COLUMNS  of y, of which images are each `1 << FIRST`-th row and column; as parameters
//                    of the kernel they, and FIRST, would be registers that it has not
//   IMAGES           images of a thread block

#include "folded.cuh"
#include "folded_means.cuh"

static_assert(TOGETHER % VECTOR == 0, "");

// The images of a level in shared memory: words of both rows of a pair, the upper row's in its lower
// half. A line of them begins with HALO zeros, and so where its first block's matrix does.
template <int LEVEL>
struct Level {
  static constexpr int ROWS = (HEIGHT + (1 << LEVEL) - 1) >> LEVEL;
  static constexpr int COLUMNS = (WIDE + (1 << LEVEL) - 1) >> LEVEL;
  static constexpr int PAIRS = (ROWS + 1) / 2, SIDE = (COLUMNS + 3) / 4;  // SIDE in blocks.
  static constexpr int LINE = 4 * (4 * SIDE + (HALO + 3) / 4 * 4), IMAGE = PAIRS * LINE;
  // Behind the images are zeros in place of a pair of rows that is not there.
  static constexpr int ZEROS = IMAGES * IMAGE;
  // 16 more than a multiple of 128, so that channels are in different banks.
  static constexpr int CHANNEL = (ZEROS + 16 * PARTS + 127) / 128 * 128 + 16;
  static constexpr int BYTES = TOGETHER * CHANNEL;

  DEVICE static constexpr int place() {
    if constexpr (LEVEL == 0) {
      return 0;
    } else {
      return Level<LEVEL - 1>::place() + Level<LEVEL - 1>::BYTES;
    }
  }

  // The word of a column of a pair of rows.
  DEVICE static unsigned* at(unsigned char* shared, int channel, int image, int pair, int column) {
    return reinterpret_cast<unsigned*>(shared + place() + channel * CHANNEL + image * IMAGE +
                                       pair * LINE) +
           HALO + column;
  }
};

constexpr int END = Level<LEVELS - 1>::place() + Level<LEVELS - 1>::BYTES;

// VECTOR channels of a pair of rows of a column of the images, zeros where they have ended. All
// loads are on their way before one is waited for.
struct Pair {
  Piece rows[2];

  Pair() = default;

  // A channel of both rows, as a word of shared memory has it.
  DEVICE unsigned both(int channel) const {
    return rows[0].at[channel] | unsigned(rows[1].at[channel]) << 16;
  }

#if HALVED
  DEVICE Pair(const Scalar* __restrict__ x, int pair, int column, int channels) {
    const Square above(x, 2 * pair, column, HIGH, BROAD, channels);
    const Square below(x, 2 * pair + 1, column, HIGH, BROAD, channels);
    rows[0] = above.means();
    rows[1] = below.means();
  }
#else
  DEVICE Pair(const Scalar* __restrict__ x, int pair, int column, int channels) {
    const int next = min(2 * pair + 1, HIGH - 1);
    rows[0] = *reinterpret_cast<const Piece*>(x + (2 * pair * BROAD + column) * channels);
    rows[1] = *reinterpret_cast<const Piece*>(x + (next * BROAD + column) * channels);
    if (2 * pair + 1 >= HIGH) rows[1] = {};
  }
#endif
};

// The channels and images of a thread block.
struct Share {
  int first, image;

  DEVICE static Share mine(int channels) {
    const int chunks = (channels + TOGETHER - 1) / TOGETHER;
    return {int(blockIdx.x) % chunks * TOGETHER, int(blockIdx.x) / chunks * IMAGES};
  }
};

// Brings a thread's share of the images into shared memory, VECTOR channels of a column of a pair of
// rows at once, AT_ONCE of which are on their way. Channels and images that are not there are others
// again: nobody keeps what becomes of them. So are items behind the last.
DEVICE void load(const Scalar* __restrict__ x, const Share& share, int count, int channels,
                 unsigned char* shared) {
  typedef Level<0> Here;
  constexpr int PIECES = TOGETHER / VECTOR, COLUMNS = PIECES * Here::COLUMNS;
  constexpr int ITEMS = IMAGES * Here::PAIRS * COLUMNS, AT_ONCE = HALVED ? 1 : 4;
#pragma unroll 1
  for (int start = threadIdx.x; start < ITEMS; start += AT_ONCE * THREADS) {
    Pair pairs[AT_ONCE];
    unsigned* to[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int item = min(start + i * THREADS, ITEMS - 1);
      const int piece = item % PIECES * VECTOR, column = item % COLUMNS / PIECES;
      const int pair = item / COLUMNS % Here::PAIRS, which = item / (COLUMNS * Here::PAIRS);
      const int channel = min(share.first + piece, channels - VECTOR);
      const Offset from = Offset(min(share.image + which, count - 1)) * HIGH * BROAD * channels;
      pairs[i] = Pair(x + from + channel, pair, column, channels);
      to[i] = Here::at(shared, piece, which, pair, column);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
      for (int j = 0; j < VECTOR; j++)
        to[i][j * (Here::CHANNEL / 4)] = pairs[i].both(j);
  }
}

// The same the other way, to each STEP-th row and column of y.
DEVICE void store(unsigned char* shared, const Share& share, int count, int channels,
                  Scalar* __restrict__ y) {
  typedef Level<0> Here;
  constexpr int PIECES = TOGETHER / VECTOR, COLUMNS = PIECES * Here::COLUMNS;
  constexpr int ITEMS = IMAGES * Here::PAIRS * COLUMNS, STEP = 1 << FIRST;
#pragma unroll 2
  for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
    const int piece = item % PIECES * VECTOR, column = item % COLUMNS / PIECES;
    const int pair = item / COLUMNS % Here::PAIRS, which = item / (COLUMNS * Here::PAIRS);
    if (share.first + piece >= channels || share.image + which >= count) continue;
    Piece rows[2];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      const unsigned both = *Here::at(shared, piece + i, which, pair, column);
      rows[0].at[i] = Scalar(both);
      rows[1].at[i] = Scalar(both >> 16);
    }
    Scalar* to = y + share.first + piece;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = 2 * pair + r;
      if (row >= Here::ROWS) continue;
      const Offset pixel =
          (Offset(share.image + which) * Y_ROWS + row * STEP) * Y_COLUMNS + column * STEP;
      *reinterpret_cast<Piece*>(to + pixel * channels) = rows[r];
    }
  }
}

// Makes the means of the level above, and those of the levels below them.
template <int LEVEL>
DEVICE void make_means(unsigned char* shared) {
  typedef Level<LEVEL> Here;
  typedef Level<LEVEL - 1> Above;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 2
  for (int i = lane; i < IMAGES * Here::PAIRS * Here::COLUMNS; i += 32) {
    const int column = i % Here::COLUMNS, pair = i / Here::COLUMNS % Here::PAIRS;
    const int image = i / (Here::COLUMNS * Here::PAIRS);
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
      const int channel = GROUP * warp + c;
      float means[2] = {};
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (2 * pair + r >= Above::PAIRS) continue;
        const unsigned* from = Above::at(shared, channel, image, 2 * pair + r, 2 * column);
        means[r] = mean(from[0], from[1], from[0] >> 16, from[1] >> 16);
      }
      *Here::at(shared, channel, image, pair, column) = packed(means[0], means[1]);
    }
  }
  __syncwarp();
  if constexpr (LEVEL + 1 < LEVELS) make_means<LEVEL + 1>(shared);
}

DEVICE constexpr int power_of_two(int least) {
  return least > 1 ? 2 * power_of_two((least + 1) / 2) : 1;
}

// Makes what a level adds, after all below it.
template <int LEVEL>
DEVICE void make_level(const unsigned* __restrict__ taps, int first, int channels,
                       unsigned char* shared) {
  typedef Level<LEVEL> Here;
  if constexpr (LEVEL + 1 < LEVELS)
    make_level<LEVEL + 1>(taps, first, channels, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Matrix matrix;
  load_taps(taps, FIRST + LEVEL, first, channels, matrix);
  float biases[GROUP];
  load_biases(taps, FIRST + LEVEL, first, channels, biases);

  // A pair of rows has ACROSS of the 16 blocks, the last of which may not be in the image. Then
  // lanes read another one, and their results are not kept.
  constexpr int ACROSS = power_of_two(Here::SIDE), DOWN = 16 / ACROSS;
  static_assert(ACROSS <= 16, "images are of at most 16 blocks");
  constexpr int UNITS = IMAGES * Here::PAIRS;  // Pairs of rows of all images.
  constexpr int TIMES = (UNITS + DOWN - 1) / DOWN;
  // Results stay in registers until no later product reads what is in their place.
  constexpr int WAITING = (R + DOWN - 1) / DOWN;
  // The pair of rows, and the block in it, that row `row` of M belongs to.
  auto unit_of = [](int time, int row) { return time * DOWN + row / ACROSS; };
  auto block_of = [](int row) { return min(row % ACROSS, Here::SIDE - 1); };
  unsigned char* const own = shared + Here::place() + GROUP * warp * Here::CHANNEL;
  // The row of M that this lane gives the place of, in the first or second four columns.
  const int given = lane % 16, part = lane / 16;
  unsigned waiting[WAITING + 1][2][GROUP];
#pragma unroll 1
  for (int time = 0; time < TIMES + WAITING; time++) {
    if (time < TIMES) {
      float sums[GROUP][4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = lane / 4 + 8 * h, unit = min(unit_of(time, row), UNITS - 1);
        const int pair = unit % Here::PAIRS, column = 4 * block_of(row) + lane % 4;
#pragma unroll
        for (int c = 0; c < GROUP; c++) {
          float under = biases[c];
          if constexpr (LEVEL + 1 < LEVELS)
            under += number_of(*Level<LEVEL + 1>::at(shared, GROUP * warp + c, unit / Here::PAIRS,
                                                     pair / 2, column / 2) >>
                               pair % 2 * 16);
          sums[c][2 * h] = sums[c][2 * h + 1] = under;
        }
      }
      const int unit = min(unit_of(time, given), UNITS - 1), pair = unit % Here::PAIRS;
      const int at = unit * Here::LINE + 16 * (block_of(given) + part);
#pragma unroll
      for (int i = 0; i < REACHED; i++) {
        const int other = pair + i - R;
        const unsigned char* from =
            own + (other >= 0 && other < Here::PAIRS ? at + (i - R) * Here::LINE : Here::ZEROS);
#pragma unroll
        for (int c = 0; c < GROUP; c++) {
          const unsigned* b = matrix[c] + i * PARTS;
          unsigned a[4];
          matrices(a, from + c * Here::CHANNEL);
          multiply16(sums[c], a[0], a[1], a[2], a[3], b[0], b[1], sums[c]);
#if KERNEL_SIZE == 5
          unsigned last[2];
          matrices(last, from + c * Here::CHANNEL + 32);
          multiply8(sums[c], last[0], last[1], b[2], sums[c]);
#elif KERNEL_SIZE == 7
          matrices(a, from + c * Here::CHANNEL + 32);
          multiply16(sums[c], a[0], a[1], a[2], a[3], b[2], b[3], sums[c]);
#endif
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int c = 0; c < GROUP; c++)
          waiting[WAITING][h][c] = packed(sums[c][2 * h], sums[c][2 * h + 1]);
      }
    }
    __syncwarp();
    const int done = time - WAITING;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = lane / 4 + 8 * h, unit = unit_of(done, row);
      const bool kept = done >= 0 && unit < UNITS && row % ACROSS < Here::SIDE;
#pragma unroll
      for (int c = 0; c < GROUP; c++) {
        if (kept)
          *Here::at(shared, GROUP * warp + c, 0, unit, 4 * (row % ACROSS) + lane % 4) =
              waiting[0][h][c];
#pragma unroll
        for (int i = 0; i < WAITING; i++) waiting[i][h][c] = waiting[i + 1][h][c];
      }
    }
    __syncwarp();
  }
}

// Brings a thread block's images into shared memory, and makes the means of all levels.
DEVICE void begin(const Scalar* __restrict__ x, const Share& share, int count, int channels,
                  unsigned char* shared) {
#pragma unroll 1
  for (int at = 16 * int(threadIdx.x); at < END; at += 16 * THREADS)
    *reinterpret_cast<Eight*>(shared + at) = {};
  __syncthreads();
  load(x, share, count, channels, shared);
  __syncthreads();
  if constexpr (LEVELS > 1) make_means<1>(shared);
}

// All levels from the first on of IMAGES images and TOGETHER channels in each block. Taps are those of
// all levels.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
folded_levels(const Scalar* __restrict__ x, const unsigned* __restrict__ taps,
              int count, int channels, Scalar* __restrict__ y) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const Share share = Share::mine(channels);
  begin(x, share, count, channels, shared);
  const int own = share.first + GROUP * (int(threadIdx.x) / 32);
  make_level<0>(taps, own, channels, shared);
  __syncthreads();
  store(shared, share, count, channels, y);
}
