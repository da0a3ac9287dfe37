// A level of the wavelet convolution of 16-bit images [N, H, W, C] on tensor cores, for NVRTC.
//
// The analysis of one level, the convolution of its four bands, their synthesis, and the base
// convolution are linear, and repeat every two pixels: together they are one convolution of 2k x 2k
// taps for each of the four places in a square of two rows and columns. The host folds the taps.
// Bands are never computed. A deeper level is the same on the means of the squares of the level
// above, and what it makes is added to all pixels of a square.
//
// A channel's convolution is a product of matrices. M: 16 blocks of four columns of one pair of
// rows. K: a pair of rows of the pixels that such a block reads. N: its four columns of a pair of
// rows of the output. So the taps are a Toeplitz matrix, and pairs of rows stream through: each is
// multiplied for all pairs of the output that it reaches, whose sums wait in registers. Of narrow
// images several lie beside each other. Pairs outside of the image are neither read nor multiplied.
//
// Pixels are kept in shared memory as groups of GROUP channels, one group after the other: a warp
// treats a group, and its loads are neighbours. Thread blocks stay, and take one tile after another
// of the same channels without a pause of the copies.
//
// Arithmetic is that of the tensor cores: products of 16-bit numbers, summed in float32. A pixel
// that is Inf or NaN is multiplied by zeros of the Toeplitz matrix too: it makes NaN of the block's
// four columns and pair of rows wherever its matrix reaches.
//
// The host defines these macros:
//   FORWARD, LEVELS, MEANS or WEIGHTS   the kernel to compile
//   BFLOAT16         1 bfloat16, 0 float16
//   VECTOR           channels that one access to memory takes, a divisor of C
// and for all but MEANS:
//   KERNEL_SIZE      3, 5 or 7
//   ACROSS           blocks of four columns of an image in a tile
//   IMAGES           images of a tile; with ACROSS a product of 16 at most, of weights exactly
//   PAIRS            pairs of rows of a tile
//   STAGES           pairs of rows in shared memory, at least 2
//   GROUP            channels of a warp, 4 or 2, a multiple of VECTOR
//   GROUPS           warps of a block
//   RESIDENT         blocks of a multiprocessor, for which registers are to suffice
//   BOXED            whether images are copied as boxes, by TMA
//   BELOW            of BOXED whether something is added to squares
// LEVELS is the number of levels, of images of HEIGHT x WIDE, which a thread block has as a whole.

#include "../common/tensor_cores.cuh"

#if BFLOAT16
DEVICE float number(Scalar v) { return __uint_as_float(unsigned(v) << 16); }
constexpr unsigned ONES = 0x3f803f80;
#else
#ifdef __CUDACC__
DEVICE float half_number(Scalar v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v));
  return result;
}
#endif
DEVICE float number(Scalar v) { return half_number(v); }
constexpr unsigned ONES = 0x3c003c00;
#endif

// ---------------------------------------------------------------------------------------------

struct Images {
  int count, height, width, channels;
};

#if MEANS

template <int COUNT>
struct alignas(2 * COUNT) Vector {
  Scalar at[COUNT];
};

DEVICE Vector<VECTOR> rounded(const float (&values)[VECTOR]) {
  Vector<VECTOR> result;
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) {
    const unsigned both = packed(values[i], i + 1 < VECTOR ? values[i + (i + 1 < VECTOR)] : 0.0f);
    result.at[i] = Scalar(both);
    if (i + 1 < VECTOR) result.at[i + (i + 1 < VECTOR)] = Scalar(both >> 16);
  }
  return result;
}

// The means of the squares of two rows and columns, with zeros where the image has ended. A thread
// makes VECTOR channels of a pixel.
extern "C" __global__ void __launch_bounds__(256)
folded_means(const Scalar* __restrict__ x, int count, int channels, int height, int width,
             Scalar* __restrict__ y) {
  const int parts = channels / VECTOR, across = (width + 1) / 2, down = (height + 1) / 2;
  Offset at = Offset(blockIdx.x) * 256 + threadIdx.x;
  Scalar* to = y + at * VECTOR;
  const int channel = int(at % parts) * VECTOR;
  at /= parts;
  const int column = int(at % across);
  at /= across;
  const int row = int(at % down), image = int(at / down);
  if (image >= count) return;

  Vector<VECTOR> pixels[2][2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int r = 2 * row + i, c = 2 * column + j;
      if (r < height && c < width)
        pixels[i][j] = *reinterpret_cast<const Vector<VECTOR>*>(
            x + ((Offset(image) * height + r) * width + c) * channels + channel);
    }
  }
  float means[VECTOR];
#pragma unroll
  for (int v = 0; v < VECTOR; v++)
    means[v] = 0.25f * ((number(pixels[0][0].at[v]) + number(pixels[0][1].at[v])) +
                        (number(pixels[1][0].at[v]) + number(pixels[1][1].at[v])));
  *reinterpret_cast<Vector<VECTOR>*>(to) = rounded(means);
}

#else

constexpr int R = KERNEL_SIZE / 2;               // Pairs of rows that a pair reads to each side.
constexpr int REACHED = KERNEL_SIZE;             // Pairs of the output that a pair is multiplied for.
constexpr int HALO = 2 * R;                      // Columns that a block reads to each side.
constexpr int PARTS = 1 + R;                     // Times four columns that a block reads.
constexpr int TOGETHER = GROUP * GROUPS;       // Channels of a thread block.
constexpr int THREADS = 32 * GROUPS;
static_assert(GROUP % VECTOR == 0, "");

// Bytes from one group to the next: 16 more than a multiple of 128, so that the groups of a pixel
// are in different banks.
DEVICE constexpr int group_bytes(int pixels) { return (2 * GROUP * pixels + 127) / 128 * 128 + 16; }

// The channels of a group of one pixel, two to a word.
struct alignas(2 * GROUP) Channels {
  unsigned words[GROUP / 2];
};

DEVICE Channels channels_at(const unsigned char* from) {
  return *reinterpret_cast<const Channels*>(from);
}

// Starts the copy of a group of a pixel, of which `left` channels are there; an address that is not
// read is x's own.
DEVICE void copy_pixel(const Scalar* x, const Scalar* from, bool inside, int left,
                       unsigned char* to) {
#pragma unroll
  for (int i = 0; i < GROUP; i += VECTOR) {
    const bool there = inside && i < left;
#if VECTOR == 1
    reinterpret_cast<Scalar*>(to)[i] = there ? from[i] : Scalar(0);
#else
    copy<2 * VECTOR>(to + 2 * i, there ? from + i : x, there);
#endif
  }
}

DEVICE void store_pixel(const Channels& values, int left, Scalar* to) {
#if VECTOR == GROUP
  if (left > 0) *reinterpret_cast<Channels*>(to) = values;
#elif VECTOR == 2
#pragma unroll
  for (int c = 0; c < GROUP; c += 2)
    if (c < left) *reinterpret_cast<unsigned*>(to + c) = values.words[c / 2];
#else
#pragma unroll
  for (int c = 0; c < GROUP; c++)
    if (c < left) to[c] = Scalar(values.words[c / 2] >> 16 * (c % 2));
#endif
}

// Two pixels' values of one channel, the first one in the lower half.
DEVICE unsigned of_channel(int channel, const Channels& one, const Channels& other) {
  return __byte_perm(one.words[channel / 2], other.words[channel / 2],
                     channel % 2 ? 0x7632 : 0x5410);
}

#if !LEVELS

constexpr int BLOCKS = ACROSS * IMAGES;
constexpr int WIDTH = 4 * ACROSS, LOADED = WIDTH + 2 * HALO;  // Columns of a tile and of its input.
static_assert(BLOCKS <= 16, "");

#if BOXED

static_assert(TOGETHER == CHUNK, "a box has all channels of a thread block");
// Columns of a box, a multiple of eight pixels, after which swizzles repeat.
constexpr int BOX = (LOADED + 7) / 8 * 8;

#else

// The pixels of a pair of rows of all images, of which thread t copies, for group t % GROUPS, the
// pixels t / GROUPS, 32 more, and so on.
template <int COLUMNS>
struct Pixels {
  static constexpr int COUNT = 2 * IMAGES * COLUMNS;
  static constexpr int GROUP_BYTES = group_bytes(COUNT), BYTES = GROUPS * GROUP_BYTES;
  static constexpr int ITEMS = (COUNT + 31) / 32;

  int offsets[ITEMS];  // From the pixel of the tile's first column and this pair's upper row.
  unsigned there = 0;  // A bit of each item, whether it is in the image, or may be.
  unsigned lower = 0;  // Whether it is of the lower row.

  DEVICE static int pixel(int item) { return int(threadIdx.x) / GROUPS + 32 * item; }
  DEVICE static int column(int item) { return pixel(item) % COLUMNS; }
  DEVICE static int line(int item) { return pixel(item) / COLUMNS; }

  // What is the same of all tiles; `first` is the column of the tile that is copied first.
  DEVICE void prepare(const Images& images, int first) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int row = line(i) / 2 * images.height + line(i) % 2;
      offsets[i] = (row * images.width + first + column(i)) * images.channels;
      lower |= unsigned(line(i) % 2) << i;
    }
  }

  // What is the same of all pairs of a tile.
  DEVICE void enter(const Images& images, int image, int left) {
    there = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int at = left + column(i);
      const bool inside = at >= 0 && at < images.width && line(i) < 2 * IMAGES &&
                          image + line(i) / 2 < images.count;
      there |= unsigned(inside) << i;
    }
  }

  // The items of a pair of rows that are in the image.
  DEVICE unsigned inside(const Images& images, int pair) const {
    return 2 * pair + 1 < images.height ? there : 2 * pair < images.height ? there & ~lower : 0;
  }

  DEVICE static unsigned char* at(unsigned char* stage, int item) {
    return stage + int(threadIdx.x) % GROUPS * GROUP_BYTES + 2 * GROUP * pixel(item);
  }

  // Starts the copies of a pair of rows; `left` channels are there of this thread's group.
  DEVICE void load(const Scalar* x, const Scalar* from, unsigned inside, int left,
                   unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      if (32 * i + 31 < COUNT || pixel(i) < COUNT)
        copy_pixel(x, from + offsets[i], inside >> i & 1, left, at(stage, i));
    }
  }
};

typedef Pixels<LOADED> Inputs;
typedef Pixels<WIDTH> Outputs;

#endif

// The pairs of rows that a thread block treats, tile after tile.
struct Walk {
  int tile;
  int image, left, top;  // Of the tile: its first image and column, its first pair of rows.
  int pair;

  DEVICE static int tiles(const Images& images) {
    const int pairs = (images.height + 1) / 2;
    return (images.width + WIDTH - 1) / WIDTH * ((pairs + PAIRS - 1) / PAIRS) *
           ((images.count + IMAGES - 1) / IMAGES);
  }

  DEVICE void enter(const Images& images) {
    const int across = (images.width + WIDTH - 1) / WIDTH, pairs = (images.height + 1) / 2;
    const int down = (pairs + PAIRS - 1) / PAIRS;
    left = tile % across * WIDTH;
    top = tile / across % down * PAIRS;
    image = tile / across / down * IMAGES;
    pair = first();
  }

  // Sums start with the first pair of the image that the tile reaches.
  DEVICE int first() const {
#if WEIGHTS
    return top;
#else
    return max(top - R, 0);
#endif
  }

  DEVICE int bottom(const Images& images) const {
    return min(top + PAIRS, (images.height + 1) / 2);
  }

  DEVICE Offset pixel(const Images& images, int pair) const {
    return ((Offset(image) * images.height + 2 * pair) * images.width + left) * images.channels;
  }
};

#endif

#if !WEIGHTS

// The sums of all pairs of the output that wait, those that wait longest first. The last of each
// channel's stay zero: the pair of the output that a pair is the first for.
typedef float Sums[GROUP][REACHED + 1][4];

// Each channel's Toeplitz matrices: a register holds rows 2t and 2t + 1 of column g, lane 4g + t.
typedef unsigned Matrix[GROUP][REACHED * PARTS];

// Taps are `[levels, C, REACHED, 2 * KERNEL_SIZE, 2, 2, 2]`: pair of rows and column of the input,
// column and row of the output, row of the input. They move with each second column of the output.
DEVICE void load_taps(const unsigned* __restrict__ taps, int level, int first, int channels,
                      Matrix& matrix) {
  constexpr int COLUMNS = 2 * KERNEL_SIZE;
  const int lane = threadIdx.x % 32, place = lane / 4 % 4, column = lane % 4 - lane / 16 * 2;
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
    const unsigned* from =
        taps + (Offset(level) * channels + first + c) * REACHED * COLUMNS * 4 + 4 * column + place;
#pragma unroll
    for (int i = 0; i < REACHED * PARTS; i++) {
      const int at = column + 4 * (i % PARTS);
      const bool there = first + c < channels && at >= 0 && at < COLUMNS;
      matrix[c][i] = there ? from[4 * (i / PARTS * COLUMNS + 4 * (i % PARTS))] : 0;
    }
  }
}

// Multiplies a pair of rows for all pairs of the output that it reaches, which then wait for one
// less. `from` are the places of this thread's column in two blocks, and four columns further; rows
// and eight columns are so many bytes apart.
DEVICE void add_pair(const unsigned char* rows, const int (&from)[2][2], int row, int eight,
                     const Matrix& matrix, Sums& sums) {
  Channels pixels[2][2][PARTS];
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        pixels[h][r][part] = channels_at(rows + from[h][part % 2] + r * row + part / 2 * eight);
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
#pragma unroll
    for (int i = 0; i < REACHED; i++) {
      // The pair of the output that waits for i more pairs after this one.
      const unsigned* b = matrix[c] + (REACHED - 1 - i) * PARTS;
      multiply16(sums[c][i], values[0][0], values[0][1], values[1][0], values[1][1], b[0], b[1],
                 sums[c][i + 1]);
#if KERNEL_SIZE == 5
      multiply8(sums[c][i], values[2][0], values[2][1], b[2], sums[c][i]);
#elif KERNEL_SIZE == 7
      multiply16(sums[c][i], values[2][0], values[2][1], values[3][0], values[3][1], b[2], b[3],
                 sums[c][i]);
#endif
    }
  }
}

// The same for a pair below the image.
DEVICE void add_nothing(Sums& sums) {
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
#pragma unroll
    for (int i = 0; i < REACHED; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++) sums[c][i][k] = sums[c][i + 1][k];
    }
  }
}

DEVICE void clear(Sums& sums) {
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
#pragma unroll
    for (int i = 0; i < REACHED; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++) sums[c][i][k] = 0.0f;
    }
  }
}

// The pixel of register k of the pair that waits for none, with what is added to it.
DEVICE Channels finished(const Sums& sums, int k, const float (&offsets)[GROUP],
                         const Channels& under) {
  Channels out;
#pragma unroll
  for (int c = 0; c < GROUP; c += 2) {
    const unsigned word = under.words[c / 2];
    out.words[c / 2] = packed(sums[c][0][k] + (offsets[c] + number(Scalar(word))),
                              sums[c + 1][0][k] + (offsets[c + 1] + number(Scalar(word >> 16))));
  }
  return out;
}

#endif

#if FORWARD && !BOXED

// What is added to a square of four pixels, of the row of a pair.
constexpr int BELOW_PIXELS = 2 * BLOCKS;
constexpr int BELOW_GROUP = group_bytes(BELOW_PIXELS);
constexpr int STAGE = Inputs::BYTES + GROUPS * BELOW_GROUP;

// A thread block makes TOGETHER channels of one tile after another. Taps are those of all levels, of
// which this one is `level`; `below [N, ceil(H / 2), ceil(W / 2), C]` is
// added to the squares of two rows and columns, `bias [C]` to all pixels; both may be null.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
folded_forward(const Scalar* __restrict__ x, const unsigned* __restrict__ taps,
               const Scalar* __restrict__ below, const float* __restrict__ bias, int level,
               int count, int channels, int height, int width, int programs,
               Scalar* __restrict__ y) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  unsigned char* const results = shared + STAGES * STAGE;
  const Images images = {count, height, width, channels};
  const int chunks = (channels + TOGETHER - 1) / TOGETHER, tiles = Walk::tiles(images);
  const int chunk = int(blockIdx.x) % chunks * TOGETHER, begin = int(blockIdx.x) / chunks;
  const int pairs = (height + 1) / 2, squares = (width + 1) / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  Matrix matrix;
  load_taps(taps, level, chunk + GROUP * warp, channels, matrix);
  float offsets[GROUP];
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
    const int channel = chunk + GROUP * warp + c;
    offsets[c] = channel < channels && bias != nullptr ? bias[channel] : 0.0f;
  }

  // This thread's two blocks, and its column of them.
  int from[2][2], to[2], square[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    // A block that there is not is another one, whose results nobody stores.
    const int block = min(lane / 4 + 8 * h, BLOCKS - 1), image = block / ACROSS;
    const int column = block % ACROSS * 4 + lane % 4;
    from[h][0] = warp * Inputs::GROUP_BYTES + 2 * GROUP * (2 * image * LOADED + column);
    from[h][1] = from[h][0] + 8 * GROUP;
    to[h] = warp * Outputs::GROUP_BYTES + 2 * GROUP * (2 * image * WIDTH + column);
    square[h] = Inputs::BYTES + warp * BELOW_GROUP + 2 * GROUP * (2 * block + lane % 4 / 2);
  }

  // This thread's group and pixels of the copies.
  const int mine = chunk + GROUP * (int(threadIdx.x) % GROUPS), left = channels - mine;
  Walk loading = {begin};
  Inputs inputs;
  inputs.prepare(images, -HALO);
  const int over = int(threadIdx.x) / GROUPS;  // This thread's square of a row.
  bool over_there = false;
  Offset over_at = 0;

  auto load = [&](int slot) {
    if (loading.tile < tiles) {
      if (loading.pair == loading.first()) {
        inputs.enter(images, loading.image, loading.left - HALO);
        const int image = loading.image + over / (2 * ACROSS);
        const int column = loading.left / 2 + over % (2 * ACROSS);
        over_there = below != nullptr && over < BELOW_PIXELS && image < count && column < squares;
        over_at = (Offset(image) * pairs * squares + column) * channels + mine;
      }
      unsigned char* stage = shared + slot * STAGE;
      const Scalar* at = x + loading.pixel(images, loading.pair) + mine;
      if (loading.pair < pairs)
        inputs.load(x, at, inputs.inside(images, loading.pair), left, stage);
      const int done = loading.pair - R;
      if (over_there && done >= loading.top)
        copy_pixel(x, below + over_at + Offset(done) * squares * channels, true, left,
                   stage + Inputs::BYTES + int(threadIdx.x) % GROUPS * BELOW_GROUP +
                       2 * GROUP * over);
      if (++loading.pair == loading.bottom(images) + R) {
        loading.tile += programs;
        loading.enter(images);
      }
    }
    commit();
  };

  // Results that another step has left in shared memory, and where they go.
  Outputs outputs;
  outputs.prepare(images, 0);
  unsigned stored = 0;
  Offset stored_at = 0;

  auto store = [&](int step) {
#pragma unroll
    for (int i = 0; i < Outputs::ITEMS; i++) {
      if (!(stored >> i & 1)) continue;
      store_pixel(channels_at(Outputs::at(results + step % 2 * Outputs::BYTES, i)), left,
                  y + stored_at + outputs.offsets[i]);
    }
  };

  Sums sums = {};
  Walk walk = {begin};
  if (begin < tiles) {
    loading.enter(images);
    walk.enter(images);
  }
#pragma unroll 1
  for (int step = 0; step < STAGES - 1; step++) load(step);
#pragma unroll 1
  for (int step = 0, slot = 0;; step++) {
    wait<STAGES - 2>();
    // What this step reads is there, and nobody reads what is overwritten from here on.
    __syncthreads();
    store(step + 1);
    if (walk.tile >= tiles) break;
    load(slot == 0 ? STAGES - 1 : slot - 1);
    const unsigned char* stage = shared + slot * STAGE;

    if (walk.pair == walk.first()) {
      outputs.enter(images, walk.image, walk.left);
      clear(sums);
    }
    if (walk.pair < pairs) {
      add_pair(stage, from, 2 * GROUP * LOADED, 16 * GROUP, matrix, sums);
    } else {
      add_nothing(sums);
    }
    const int done = walk.pair - R;
    stored = 0;
    if (done >= walk.top) {
      unsigned char* result = results + step % 2 * Outputs::BYTES;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const Channels under = below == nullptr ? Channels{} : channels_at(stage + square[h]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const Channels out = finished(sums, 2 * h + r, offsets, under);
          if (lane / 4 + 8 * h < BLOCKS)
            *reinterpret_cast<Channels*>(result + to[h] + 2 * GROUP * r * WIDTH) = out;
        }
      }
      stored = outputs.inside(images, done);
      stored_at = walk.pixel(images, done) + mine;
    }
    if (++walk.pair == walk.bottom(images) + R) {
      walk.tile += programs;
      walk.enter(images);
    }
    if (++slot == STAGES) slot = 0;
  }
}

#elif FORWARD

constexpr int ROW = BOX * PIXEL, ROWS = 2 * ROW * IMAGES;
constexpr int SQUARES = BELOW ? 2 * BLOCKS * PIXEL : 0;  // What is below a pair of rows.
constexpr int STAGE = ROWS + (SQUARES + 1023) / 1024 * 1024;
constexpr int RESULT = (2 * WIDTH * PIXEL * IMAGES + 1023) / 1024 * 1024;
// A stage that is full says that the results of its last use were read, see `retire`.
constexpr int BUFFERS = STAGES + 1;

// The same with copies of boxes, for which warps do not wait for one another.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
folded_forward(BOXES x, const unsigned* __restrict__ taps,
#if BELOW
             BOXES below,
#endif
             const float* __restrict__ bias, int level, int count, int channels, int height,
             int width, int programs, BOXES y) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  unsigned char* const results = shared + STAGES * STAGE;
  Barrier* const full = reinterpret_cast<Barrier*>(results + BUFFERS * RESULT);
  Barrier* const done = full + STAGES;
  const Images images = {count, height, width, channels};
  const int chunks = (channels + TOGETHER - 1) / TOGETHER, tiles = Walk::tiles(images);
  const int chunk = int(blockIdx.x) % chunks * TOGETHER, begin = int(blockIdx.x) / chunks;
  const int pairs = (height + 1) / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (begin >= tiles) return;

  Walk loading = {begin}, walk = {begin}, storing = {begin};
  loading.enter(images);
  walk.enter(images);
  storing.enter(images);
  auto advance = [&](Walk& at) {
    if (++at.pair < at.bottom(images) + R) return;
    at.tile += programs;
    at.enter(images);
  };
  auto fill = [&](int slot) {
    if (loading.tile >= tiles) return;
    unsigned char* stage = shared + slot * STAGE;
    const int over = loading.pair - R;
    const bool there = loading.pair < pairs, added = BELOW && over >= loading.top;
    expect(full + slot, (there ? ROWS : 0) + (added ? SQUARES : 0));
    if (there)
      load_box(stage, x, full + slot, chunk, loading.left - HALO, 2 * loading.pair, loading.image);
#if BELOW
    if (added)
      load_box(stage + ROWS, below, full + slot, chunk, loading.left / 2, over, loading.image);
#endif
    advance(loading);
  };
  // Stores the results of the oldest step that was not, and fills its stage anew: one thread, a step
  // after all warps did that, so that it seldom waits for them.
  int oldest = 0, stored_buffer = 0;
  unsigned oldest_phase = 0;
  auto retire = [&]() {
    wait_for(done + oldest, oldest_phase);
    if (storing.pair - R >= storing.top) {
      store_box(y, chunk, storing.left, 2 * (storing.pair - R), storing.image,
                results + stored_buffer * RESULT);
      if (++stored_buffer == BUFFERS) stored_buffer = 0;
    }
    stored<1>();
    fill(oldest);
    if (++oldest == STAGES) {
      oldest = 0;
      oldest_phase ^= 1;
    }
    advance(storing);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      make(full + i, 1);
      make(done + i, GROUPS);
    }
    made();
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) fill(i);

  Matrix matrix;
  load_taps(taps, level, chunk + GROUP * warp, channels, matrix);
  float offsets[GROUP];
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
    const int channel = chunk + GROUP * warp + c;
    offsets[c] = channel < channels && bias != nullptr ? bias[channel] : 0.0f;
  }
  int from[2][2], to[2][2], square[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int block = min(lane / 4 + 8 * h, BLOCKS - 1), image = block / ACROSS;
    const int column = block % ACROSS * 4 + lane % 4, group = 2 * GROUP * warp;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      from[h][i] = swizzled(PIXEL * (2 * image * BOX + column + 4 * i) + group);
      to[h][i] = swizzled(PIXEL * ((2 * image + i) * WIDTH + column) + group);
    }
    square[h] = swizzled(ROWS + PIXEL * (2 * block + lane % 4 / 2) + group);
  }

  Sums sums = {};
  int slot = 0, buffer = 0;
  unsigned phase = 0;
  bool begun = false;
#pragma unroll 1
  while (walk.tile < tiles) {
    wait_for(full + slot, phase);
    const unsigned char* stage = shared + slot * STAGE;
    if (walk.pair == walk.first()) clear(sums);
    if (walk.pair < pairs) {
      add_pair(stage, from, ROW, 8 * PIXEL, matrix, sums);
    } else {
      add_nothing(sums);
    }
    if (walk.pair - R >= walk.top) {
      unsigned char* result = results + buffer * RESULT;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const Channels under = BELOW ? channels_at(stage + square[h]) : Channels{};
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const Channels out = finished(sums, 2 * h + r, offsets, under);
          if (lane / 4 + 8 * h < BLOCKS) *reinterpret_cast<Channels*>(result + to[h][r]) = out;
        }
      }
      if (++buffer == BUFFERS) buffer = 0;
    }
    publish();
    __syncwarp();
    if (lane == 0) arrive(done + slot);
    if (threadIdx.x == 0 && begun) retire();
    __syncwarp();
    begun = true;
    advance(walk);
    if (++slot == STAGES) {
      slot = 0;
      phase ^= 1;
    }
  }
  if (threadIdx.x != 0) return;
  retire();
  stored<0>();
}

#elif LEVELS

// The images of a level in shared memory, with zeros around them: their means where it is deeper,
// and in their place what this level and those below it make.
template <int LEVEL>
struct Level {
  static constexpr int ROWS = (HEIGHT + (1 << LEVEL) - 1) >> LEVEL;
  static constexpr int COLUMNS = (WIDE + (1 << LEVEL) - 1) >> LEVEL;
  static constexpr int PAIRS = (ROWS + 1) / 2, SIDE = (COLUMNS + 3) / 4;  // SIDE in blocks.
  static constexpr int LINE = 4 * SIDE + 2 * HALO, IMAGE = 2 * PAIRS * LINE;
  static constexpr int GROUP_BYTES = group_bytes(IMAGES * IMAGE), BYTES = GROUPS * GROUP_BYTES;

  DEVICE static constexpr int place() {
    if constexpr (LEVEL == 0) {
      return 0;
    } else {
      return Level<LEVEL - 1>::place() + Level<LEVEL - 1>::BYTES;
    }
  }

  // This thread's place of a pixel of a warp's group.
  DEVICE static unsigned char* at(unsigned char* shared, int group, int image, int row, int column) {
    return shared + place() + group * GROUP_BYTES +
           2 * GROUP * (image * IMAGE + row * LINE + HALO + column);
  }
};

DEVICE Channels mean(const Channels (&squares)[4]) {
  Channels result;
#pragma unroll
  for (int c = 0; c < GROUP / 2; c++) {
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      low += 0.25f * number(Scalar(squares[k].words[c]));
      high += 0.25f * number(Scalar(squares[k].words[c] >> 16));
    }
    result.words[c] = packed(low, high);
  }
  return result;
}

// Makes the means of the level above.
template <int LEVEL>
DEVICE void make_means(unsigned char* shared) {
  typedef Level<LEVEL> Here;
  typedef Level<LEVEL - 1> Above;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int i = lane; i < IMAGES * Here::ROWS * Here::COLUMNS; i += 32) {
    const int column = i % Here::COLUMNS, row = i / Here::COLUMNS % Here::ROWS;
    const int image = i / (Here::COLUMNS * Here::ROWS);
    Channels squares[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
      squares[k] = channels_at(Above::at(shared, warp, image, 2 * row + k / 2, 2 * column + k % 2));
    *reinterpret_cast<Channels*>(Here::at(shared, warp, image, row, column)) = mean(squares);
  }
  __syncwarp();
  if constexpr (LEVEL + 1 < LEVELS) make_means<LEVEL + 1>(shared);
}

// Makes a level, after all below it; pixels that are not in the image become anything.
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

  constexpr int BLOCKS_HERE = IMAGES * Here::SIDE;
  int from[2][2], to[2];
  const unsigned char* square[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int block = min(lane / 4 + 8 * h, BLOCKS_HERE - 1), image = block / Here::SIDE;
    const int column = block % Here::SIDE * 4 + lane % 4;
    to[h] = int(Here::at(shared, warp, image, 0, column) - shared);
    from[h][0] = to[h] - 2 * GROUP * HALO;
    from[h][1] = from[h][0] + 8 * GROUP;
    if constexpr (LEVEL + 1 < LEVELS)
      square[h] = Level<LEVEL + 1>::at(shared, warp, image, 0, column / 2);
  }
  Sums sums = {};
  constexpr int LINES = 2 * GROUP * 2 * Here::LINE;
#pragma unroll 1
  for (int pair = 0; pair < Here::PAIRS + R; pair++) {
    if (pair < Here::PAIRS) {
      add_pair(shared + pair * LINES, from, LINES / 2, 16 * GROUP, matrix, sums);
    } else {
      add_nothing(sums);
    }
    const int done = pair - R;
    if (done < 0) continue;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Channels under = {};
      if constexpr (LEVEL + 1 < LEVELS)
        under = channels_at(square[h] + done * 2 * GROUP * Level<LEVEL + 1>::LINE);
      if (lane / 4 + 8 * h < BLOCKS_HERE) {
#pragma unroll
        for (int r = 0; r < 2; r++)
          *reinterpret_cast<Channels*>(shared + to[h] + done * LINES + 2 * GROUP * r * Here::LINE) =
              finished(sums, 2 * h + r, offsets, under);
      }
    }
  }
  __syncwarp();
}

// All levels from `level` on of IMAGES images and TOGETHER channels in each block.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
folded_levels(const Scalar* __restrict__ x, const unsigned* __restrict__ taps,
              const float* __restrict__ bias, int level, int count, int channels,
              Scalar* __restrict__ y) {
  typedef Level<0> Here;
  static_assert(Here::SIDE * IMAGES <= 16, "");
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const int chunks = (channels + TOGETHER - 1) / TOGETHER;
  const int chunk = int(blockIdx.x) % chunks * TOGETHER, image = int(blockIdx.x) / chunks * IMAGES;
  const int group = threadIdx.x % GROUPS, mine = chunk + GROUP * group, left = channels - mine;

  const Scalar* from = x + mine;
#pragma unroll 4
  for (int pixel = threadIdx.x / GROUPS; pixel < IMAGES * Here::IMAGE; pixel += 32) {
    const int column = pixel % Here::LINE - HALO, row = pixel / Here::LINE % (2 * Here::PAIRS);
    const int which = image + pixel / Here::IMAGE;
    const bool inside = column >= 0 && column < WIDE && row < HEIGHT && which < count;
    copy_pixel(x, from + ((Offset(which) * HEIGHT + row) * WIDE + column) * channels, inside, left,
               shared + group * Here::GROUP_BYTES + 2 * GROUP * pixel);
  }
  commit();
  constexpr int END = Level<LEVELS - 1>::place() + Level<LEVELS - 1>::BYTES;
#pragma unroll 1
  for (int at = Here::BYTES + 16 * int(threadIdx.x); at < END; at += 16 * THREADS)
    *reinterpret_cast<Eight*>(shared + at) = {};
  wait<0>();
  __syncthreads();
  if constexpr (LEVELS > 1) make_means<1>(shared);
  make_level<0>(taps, bias, level, chunk + GROUP * (int(threadIdx.x) / 32), channels, shared);
  __syncthreads();

#pragma unroll 4
  for (int pixel = threadIdx.x / GROUPS; pixel < IMAGES * HEIGHT * WIDE; pixel += 32) {
    const int column = pixel % WIDE, row = pixel / WIDE % HEIGHT, which = pixel / (WIDE * HEIGHT);
    if (image + which < count)
      store_pixel(channels_at(Here::at(shared, group, which, row, column)), left,
                  y + (Offset(image) * HEIGHT * WIDE + pixel) * channels + mine);
  }
}

#else

static_assert(BLOCKS == 16, "all blocks are summed");
// Products of a channel: M is a pair of rows of eight columns of x, N a pair of rows of four columns
// of dy, K are the blocks. Of 5 x 5 the last four columns are those of two pairs of rows at once.
// The last product has the sums of dy, which a factor of ones makes.
constexpr bool MIXED = KERNEL_SIZE == 5;
constexpr int WHOLE = KERNEL_SIZE == 7 ? 2 : 1;
constexpr int SETS = WHOLE * REACHED + (MIXED ? 3 : 1);
constexpr int TAPS = 16 * KERNEL_SIZE * KERNEL_SIZE;

#if BOXED
constexpr int ROWS = 2 * BOX * PIXEL * IMAGES;
constexpr int STAGE = ROWS + (2 * WIDTH * PIXEL * IMAGES + 1023) / 1024 * 1024;
constexpr int STRIDE = PIXEL, IN_LINE = BOX;
#else
constexpr int ROWS = Inputs::BYTES, STAGE = Inputs::BYTES + Outputs::BYTES;
constexpr int STRIDE = 2 * GROUP, IN_LINE = LOADED;
#endif

// The sums of the products of a warp's channels, and what they need of the pairs before.
struct Products {
  float sums[GROUP][SETS][4] = {};
  unsigned ring[GROUP][REACHED][2];  // The last pairs of dy, the newest first.
  unsigned before[GROUP][2];         // The last columns of the last pair of x.

  DEVICE void begin() {
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
#pragma unroll
      for (int f = 0; f < 2; f++) {
        before[c][f] = 0;
#pragma unroll
        for (int i = 0; i < REACHED; i++) ring[c][i][f] = 0;
      }
    }
  }

  DEVICE void push(const Channels (&of)[2][2]) {
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
#pragma unroll
      for (int f = 0; f < 2; f++) {
#pragma unroll
        for (int i = REACHED - 1; i > 0; i--) ring[c][i][f] = ring[c][i - 1][f];
        ring[c][0][f] = of_channel(c, of[0][f], of[1][f]);
      }
    }
  }

  DEVICE void multiply(int part, const Channels (&pixels)[2][2][2]) {
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
      unsigned a[2][2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int f = 0; f < 2; f++) a[r][f] = of_channel(c, pixels[r][0][f], pixels[r][1][f]);
      }
#pragma unroll
      for (int i = 0; i < REACHED; i++) {
        float(&sum)[4] = sums[c][WHOLE * i + part];
        multiply16(sum, a[0][0], a[1][0], a[0][1], a[1][1], ring[c][i][0], ring[c][i][1], sum);
      }
    }
  }

  // The last columns: this pair with pairs 1 and R + 2 of dy, so that the one before is with those
  // above; and with pair R the sums of dy.
  DEVICE void multiply_last(const Channels (&mixed)[2][2]) {
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
      unsigned now[2] = {ONES, ONES};
      if (MIXED) {
#pragma unroll
        for (int f = 0; f < 2; f++) now[f] = of_channel(c, mixed[0][f], mixed[1][f]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float(&sum)[4] = sums[c][SETS - 3 * MIXED + i];
          const unsigned(&b)[2] = ring[c][i == 0 ? 1 : REACHED - 1];
          multiply16(sum, now[0], before[c][0], now[1], before[c][1], b[0], b[1], sum);
        }
        before[c][0] = now[0];
        before[c][1] = now[1];
      }
      float(&sum)[4] = sums[c][SETS - 1];
      multiply16(sum, now[0], ONES, now[1], ONES, ring[c][R][0], ring[c][R][1], sum);
    }
  }
};

// Weight gradients of the folded taps, in their order, and then the sums of dy:
// `[programs, C, TAPS + 1]`. `table [TAPS]` has of each tap the two places of a warp's results that
// it is the sum of, in the lower half and in the upper one.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
#if BOXED
folded_weights(BOXES x, BOXES dy,
#else
folded_weights(const Scalar* __restrict__ x, const Scalar* __restrict__ dy,
#endif
               const unsigned* __restrict__ table, int count, int channels, int height, int width,
               int programs, float* __restrict__ found) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const Images images = {count, height, width, channels};
  const int chunks = (channels + TOGETHER - 1) / TOGETHER, tiles = Walk::tiles(images);
  const int chunk = int(blockIdx.x) % chunks * TOGETHER, first = int(blockIdx.x) / chunks;
  const int pairs = (height + 1) / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // Lane 4 g + t reads, of blocks t + 4 e + 8 f, column g of x, or the like.
  const int t = lane % 4, g = lane / 4, line = t / ACROSS * 2, column = t % ACROSS * 4;
  const int pixel = line * IN_LINE + column, mixed_pixel = pixel + g / 4 * IN_LINE + 8 + g % 4;
  const int dy_pixel = (line + g / 4) * WIDTH + column + g % 4;
#if BOXED
  const int group = 2 * GROUP * warp;
  const int of_x = swizzled(PIXEL * (pixel + g) + group);
  const int of_mixed = swizzled(PIXEL * mixed_pixel + group);
  const int of_dy = ROWS + swizzled(PIXEL * dy_pixel + group);
#else
  const int of_x = warp * Inputs::GROUP_BYTES + STRIDE * (pixel + g);
  const int of_mixed = warp * Inputs::GROUP_BYTES + STRIDE * mixed_pixel;
  const int of_dy = ROWS + warp * Outputs::GROUP_BYTES + STRIDE * dy_pixel;
#endif
  // A multiple of eight pixels, after which swizzles repeat.
  constexpr auto later = [](int e, int f, int columns) {
    const int blocks = 4 * e + 8 * f;
    return STRIDE * (blocks / ACROSS * 2 * columns + blocks % ACROSS * 4);
  };

  // A pair of dy is multiplied by the pairs of x from R above to R below it: x comes R steps later.
  // After the image's last pair there is one that is zero, whose neighbour above is still to do.
  auto advance = [&](Walk& at) {
    if (++at.pair < min(at.bottom(images) + R, pairs + MIXED) + R) return;
    at.tile += programs;
    at.enter(images);
  };
  Walk loading = {first}, walk = {first};
  if (first < tiles) {
    loading.enter(images);
    walk.enter(images);
  }

#if BOXED
  Barrier* const full = reinterpret_cast<Barrier*>(shared + STAGES * STAGE);
  Barrier* const done = full + STAGES;
  auto load = [&](int slot) {
    if (loading.tile >= tiles) return;
    unsigned char* stage = shared + slot * STAGE;
    const int other = loading.pair - R;
    const bool of_dy = loading.pair < loading.bottom(images);
    expect(full + slot, (other >= 0 ? ROWS : 0) + (of_dy ? 2 * WIDTH * PIXEL * IMAGES : 0));
    if (other >= 0)
      load_box(stage, x, full + slot, chunk, loading.left - HALO, 2 * other, loading.image);
    if (of_dy)
      load_box(stage + ROWS, dy, full + slot, chunk, loading.left, 2 * loading.pair, loading.image);
    advance(loading);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      make(full + i, 1);
      make(done + i, GROUPS);
    }
    made();
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) load(i);
  unsigned phase = 0;
  bool begun = false;
#else
  const int mine = chunk + GROUP * (int(threadIdx.x) % GROUPS), left = channels - mine;
  Inputs inputs;
  Outputs outputs;
  inputs.prepare(images, -HALO);
  outputs.prepare(images, 0);
  auto load = [&](int slot) {
    if (loading.tile < tiles) {
      if (loading.pair == loading.first()) {
        inputs.enter(images, loading.image, loading.left - HALO);
        outputs.enter(images, loading.image, loading.left);
      }
      unsigned char* stage = shared + slot * STAGE;
      const int other = loading.pair - R;
      if (other >= 0)
        inputs.load(x, x + loading.pixel(images, other) + mine, inputs.inside(images, other), left,
                    stage);
      if (loading.pair < loading.bottom(images))
        outputs.load(dy, dy + loading.pixel(images, loading.pair) + mine,
                     outputs.inside(images, loading.pair), left, stage + ROWS);
      advance(loading);
    }
    commit();
  };
#pragma unroll 1
  for (int step = 0; step < STAGES - 1; step++) load(step);
#endif

  Products products;
#pragma unroll 1
  for (int slot = 0; walk.tile < tiles;) {
#if BOXED
    wait_for(full + slot, phase);
#else
    wait<STAGES - 2>();
    __syncthreads();
    load(slot == 0 ? STAGES - 1 : slot - 1);
#endif
    const unsigned char* stage = shared + slot * STAGE;
    if (walk.pair == walk.first()) products.begin();
    Channels of[2][2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int f = 0; f < 2; f++)
        of[e][f] = walk.pair < walk.bottom(images) ? channels_at(stage + of_dy + later(e, f, WIDTH))
                                           : Channels{};
    }
    products.push(of);
    if (walk.pair >= R) {
#pragma unroll
      for (int part = 0; part < WHOLE; part++) {
        Channels pixels[2][2][2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int f = 0; f < 2; f++)
              pixels[r][e][f] = channels_at(stage + of_x + later(e, f, IN_LINE) +
                                            STRIDE * (r * IN_LINE + 8 * part));
          }
        }
        products.multiply(part, pixels);
      }
      Channels mixed[2][2] = {};
      if (MIXED) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
          for (int f = 0; f < 2; f++)
            mixed[e][f] = channels_at(stage + of_mixed + later(e, f, IN_LINE));
        }
      }
      products.multiply_last(mixed);
    }
#if BOXED
    __syncwarp();
    if (lane == 0) arrive(done + slot);
    // The slot of the step before, so that nobody waits for this one's.
    if (threadIdx.x == 0 && begun) {
      const int last = slot ? slot - 1 : STAGES - 1;
      wait_for(done + last, slot ? phase : phase ^ 1);
      load(last);
    }
    __syncwarp();
    begun = true;
#endif
    advance(walk);
    if (++slot == STAGES) {
      slot = 0;
#if BOXED
      phase ^= 1;
#endif
    }
  }
#if !BOXED
  wait<0>();
#endif
  __syncthreads();

  // Through memory of the warp's own: results [SETS, 16 rows of M, 8 columns of N].
  float* const own = reinterpret_cast<float*>(shared) + warp * SETS * 128;
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
#pragma unroll
    for (int i = 0; i < SETS; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++)
        own[(16 * i + g + k / 2 * 8) * 8 + 2 * t + k % 2] = products.sums[c][i][k];
    }
    __syncwarp();
    const int channel = chunk + GROUP * warp + c;
    if (channel < channels) {
      float* to = found + (Offset(first) * channels + channel) * (TAPS + 1);
#pragma unroll 4
      for (int tap = lane; tap < TAPS; tap += 32)
        to[tap] = own[table[tap] & 0xffff] + own[table[tap] >> 16];
      if (lane == 0) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; n++) sum += own[(16 * (SETS - 1) + 8) * 8 + n];
        to[TAPS] = sum;
      }
    }
    __syncwarp();
  }
}

#endif
#endif
