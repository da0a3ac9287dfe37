// What the kernels of levels in float32 share: tiles, the coefficients of a square, and copies.
//
// Of the macros that the host defines these are used here: KERNEL_SIZE, ACROSS, IMAGES, VECTOR, BOXED.

#include "../common/boxes.cuh"

constexpr int K = KERNEL_SIZE, R = K / 2;
constexpr int COLUMNS = 4, SQUARES = COLUMNS / 2;  // Of a strip.
constexpr int HALO = 2 * R;                        // Columns that a strip reads to each side.
constexpr int WARPS = ACROSS * IMAGES;
constexpr int THREADS = BOXED ? (WARPS + 3) / 4 * 128 : 32 * WARPS;
constexpr int COPIERS = BOXED ? 128 : 0;
constexpr bool SHARED_OUT = THREADS > 128;         // Whether there are too few registers for all.
constexpr int CHUNK = 32;                          // Channels of a warp.
constexpr int WIDTH = COLUMNS * ACROSS;            // Columns of a tile.

#if BOXED
#define INPUT BOXES
#else
#define INPUT const float* __restrict__
#endif

// The sizes of what is treated.
struct Images {
  int count, height, width, channels;
};

// The four unnormalised coefficients of a square of two rows and columns.
DEVICE void analyse(const float (&pixels)[2][2], float (&square)[4]) {
  const float sum0 = pixels[0][0] + pixels[0][1], sum1 = pixels[1][0] + pixels[1][1];
  const float other0 = pixels[0][0] - pixels[0][1], other1 = pixels[1][0] - pixels[1][1];
  square[0] = sum0 + sum1;
  square[1] = sum0 - sum1;
  square[2] = other0 + other1;
  square[3] = other0 - other1;
}

#if !BOXED

// Each thread copies channels VECTOR * (t % PIECES) on of the pixels t / PIECES, and of those that all
// threads' pixels are further.
constexpr int PIECES = CHUNK / VECTOR, STEP = THREADS / PIECES;
static_assert(THREADS % PIECES == 0, "");

struct Copies {
  int channel, left;  // The thread's first channel, and how many there are from it on.

  // Starts the copies of ROWS rows of COLUMNS columns of all images of a tile; sizes are the array's.
  template <int ROWS, int COLUMNS>
  DEVICE void start(const float* from, const Images& sizes, int first_image, int first_row,
                    int first_column, unsigned char* to) const {
    constexpr int PIXELS = IMAGES * ROWS * COLUMNS;
#pragma unroll 2
    for (int i = 0; i < (PIXELS + STEP - 1) / STEP; i++) {
      const int pixel = int(threadIdx.x) / PIECES + STEP * i, line = pixel / COLUMNS;
      if (PIXELS % STEP && pixel >= PIXELS) break;
      const int image = first_image + line / ROWS, row = first_row + line % ROWS;
      const int column = first_column + pixel % COLUMNS;
      const bool inside = left > 0 && image < sizes.count && row < sizes.height && column >= 0 &&
                          column < sizes.width;
      const Offset at = (Offset(image) * sizes.height + row) * sizes.width + column;
      copy<4 * VECTOR>(reinterpret_cast<float*>(to) + pixel * CHUNK + int(threadIdx.x) % PIECES * VECTOR,
                       inside ? from + at * sizes.channels + channel : from, inside);
    }
  }
};

#endif
