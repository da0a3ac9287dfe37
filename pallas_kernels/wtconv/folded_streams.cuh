// How thread blocks of the folded wavelet convolution go through images, tile by tile, for NVRTC.
//
// Pairs of rows stream through. Of narrow images several lie beside each other. Pairs outside of the
// image are neither read nor multiplied. Thread blocks stay, and take one tile after another of the
// same channels without a pause of the copies.
//
// The host defines these macros, beside those of `folded.cuh`:
//   ACROSS           blocks of four columns of an image in a tile
//   IMAGES           images of a tile; with ACROSS a product of 16 at most, of weights exactly
//   PAIRS            pairs of rows of a tile
//   STAGES           pairs of rows in shared memory, at least 2
//   BOXED            whether images are copied as boxes, by TMA
// GROUP is a multiple of VECTOR.

#include "folded.cuh"

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

// Two pixels' values of one channel, the first one in the lower half.
DEVICE unsigned of_channel(int channel, const Channels& one, const Channels& other) {
  return __byte_perm(one.words[channel / 2], other.words[channel / 2],
                     channel % 2 ? 0x7632 : 0x5410);
}

struct Images {
  int count, height, width, channels;

  // The place of a pixel's first channel, where pixels are of each `step`-th row and column.
  DEVICE Offset pixel(int image, int row, int column, int step) const {
    return ((Offset(image) * height + row * step) * width + column * step) * channels;
  }
};

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

  // The part of an address that all tiles share; `first` is the column of the tile that is copied first.
  DEVICE void prepare(const Images& images, int first, int step) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      offsets[i] = int(images.pixel(line(i) / 2, line(i) % 2, first + column(i), step));
      lower |= unsigned(line(i) % 2) << i;
    }
  }

  // The part that all pairs of a tile share.
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

  DEVICE Offset pixel(const Images& images, int pair, int step) const {
    return images.pixel(image, 2 * pair, left, step);
  }
};
