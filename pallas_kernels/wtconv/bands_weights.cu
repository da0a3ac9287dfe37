// Gradients of a level's taps of the wavelet convolution of float32 images [N, H, W, C] with Haar
// wavelets, for NVRTC.
//
// The forward with sums and taps exchanged: a thread has a strip of four columns of one channel of dy,
// and a gradient for each tap in registers. Pairs of rows of x, and of dy R pairs ahead, stream through
// shared memory. The pixels of the pairs of dy that a pair of x reaches, and their coefficients, wait
// in registers beside the gradients: no band is written anywhere. Warps of a block add up in the end.
//
// A deeper level is the same, without a base, on the means of the squares of x and dy, which the level
// above makes. Coefficients are unnormalised sums, whose factor the host multiplies the gradients by.
//
// The host defines these macros:
//   KERNEL_SIZE      3 or 5
//   ACROSS           strips of an image in a tile
//   IMAGES           images of a tile; with ACROSS the warps that add
//   STAGES           pairs of rows in shared memory, at least 2
//   BASE             whether there is a base convolution, and a bias
//   LOWS             whether the means of squares are made
//   VECTOR           channels that one copy to shared memory takes, a divisor of C
//   BOXED            whether four more warps copy boxes, by TMA, and give their registers to the others

#include "bands.cuh"

constexpr int LOADED = WIDTH + 2 * HALO;  // Columns of x that a tile reads.
constexpr int ROW = CHUNK * LOADED;       // Elements of a row of x in shared memory.
constexpr int OUT_ROW = CHUNK * WIDTH;    // Of dy.
constexpr int BYTES = 4 * 2 * IMAGES * ROW, OUT_BYTES = 4 * 2 * IMAGES * OUT_ROW;
constexpr int STAGE = (BYTES + OUT_BYTES + 1023) / 1024 * 1024;
constexpr int TAPS = (BASE ? 5 : 4) * K * K;
constexpr int SUMS = TAPS + BASE;  // The gradient of the bias is the last one.
// How often a part of all warps' sums goes through shared memory, and how many of a warp.
constexpr int ROUNDS = (4 * CHUNK * WARPS * SUMS + STAGES * STAGE - 1) / (STAGES * STAGE);
constexpr int PART = (SUMS + ROUNDS - 1) / ROUNDS;
static_assert(4 * CHUNK * WARPS * PART <= STAGES * STAGE, "");

// The pairs of rows that a thread block treats, tile after tile: a tile has all rows, of which the
// first and the last tile of a block may have a part.
struct Walk {
  int at, end;  // Pairs of dy, of all tiles.
  int image = 0, left = 0, top = 0, bottom = 0, last = 0;
  int pair = 0;  // Of dy; that of x is R above.

  DEVICE bool more() const { return at < end; }

  DEVICE void enter(const Images& images) {
    const int across = (images.width + WIDTH - 1) / WIDTH, pairs = (images.height + 1) / 2;
    const int tile = at / pairs;
    left = tile % across * WIDTH;
    image = tile / across * IMAGES;
    pair = top = at - tile * pairs;
    bottom = min(pairs, top + end - at);
    last = min(bottom + 2 * R, pairs + R);
  }

  DEVICE void leave(const Images& images) {
    at += bottom - top;
    if (more()) enter(images);
  }

  DEVICE void advance(const Images& images) {
    if (++pair == last) leave(images);
  }
};

constexpr int REACHED = K;         // Pairs of dy whose coefficients a pair of x is multiplied by.
constexpr int ROWS = 3 * R + 2;    // Rows of dy whose pixels wait, from R rows below the first pair.

// The gradients, each band's fourth of `[k, k, 4]`, then the base's, and what waits of dy.
struct Gradients {
  float sums[SUMS];
  float bands[REACHED][4][SQUARES];
  float base[BASE ? ROWS : 1][COLUMNS];

  DEVICE Gradients() {
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
  }

  // Forgets the pairs of another tile.
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < REACHED; i++) {
#pragma unroll
      for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int s = 0; s < SQUARES; s++) bands[i][b][s] = 0.0f;
      }
    }
#pragma unroll
    for (int m = 0; m < (BASE ? ROWS : 0); m++) {
#pragma unroll
      for (int o = 0; o < COLUMNS; o++) base[m][o] = 0.0f;
    }
  }

  // Takes the next pair of dy, of which `rows` is this thread's first pixel, zeros where it is null.
  // `lows` are the sums of its squares.
  DEVICE void push(const float* rows, float (&lows)[SQUARES]) {
#pragma unroll
    for (int i = 0; i + 1 < REACHED; i++) {
#pragma unroll
      for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int s = 0; s < SQUARES; s++) bands[i][b][s] = bands[i + 1][b][s];
      }
    }
#pragma unroll
    for (int m = 0; m + 2 < (BASE ? ROWS : 0); m++) {
#pragma unroll
      for (int o = 0; o < COLUMNS; o++) base[m][o] = base[m + 2 < ROWS ? m + 2 : 0][o];
    }
#pragma unroll
    for (int s = 0; s < SQUARES; s++) {
      float pixels[2][2], square[4];
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          pixels[r][c] = rows == nullptr ? 0.0f : rows[r * OUT_ROW + (2 * s + c) * CHUNK];
          if (BASE) base[BASE ? ROWS - 2 + r : 0][2 * s + c] = pixels[r][c];
        }
      }
      analyse(pixels, square);
#pragma unroll
      for (int b = 0; b < 4; b++) bands[REACHED - 1][b][s] = square[b];
      lows[s] = square[0];
      if (BASE) sums[SUMS - 1] += square[0];
    }
  }

  // Multiplies a pair of rows of x, of which `rows` is this thread's first pixel that a strip reads.
  DEVICE void multiply(const float* rows, float (&lows)[SQUARES]) {
#pragma unroll
    for (int j = 0; j < SQUARES + 2 * R; j++) {
      float pixels[2][2], square[4];
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) pixels[r][c] = rows[r * ROW + (2 * j + c) * CHUNK];
      }
      if (BASE) multiply_base(pixels, 2 * j - HALO);
      analyse(pixels, square);
      if (j >= R && j < R + SQUARES) lows[j - R] = square[0];
#pragma unroll
      for (int s = 0; s < SQUARES; s++) {
        const int e = j - s;
        if (e < 0 || e >= K) continue;
#pragma unroll
        for (int i = 0; i < REACHED; i++) {
#pragma unroll
          for (int b = 0; b < 4; b++)
            sums[4 * ((K - 1 - i) * K + e) + b] += square[b] * bands[i][b][s];
        }
      }
    }
  }

  // The same of two columns for the base, the first of which is so far right of the strip's.
  DEVICE void multiply_base(const float (&pixels)[2][2], int column) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int o = 0; o < COLUMNS; o++) {
          const int e = column + c - o + R;
          if (e < 0 || e >= K) continue;
#pragma unroll
          for (int t = 0; t < K; t++)
            sums[4 * K * K + t * K + e] += pixels[r][c] * base[r + 2 * R - t][o];
        }
      }
    }
  }
};

// Thread blocks of a number are those of all chunks of 32 channels, and share the pairs of all tiles
// with the other `programs`, each of which leaves gradients `found [programs, SUMS, C]`. `lows` are
// the means of squares, of x and then of dy in each pixel: one array, for which XLA finds room in that
// of dx, where it would not for two. Levels below the first read it as both x and dy.
extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, 1)
bands_weights(INPUT x, INPUT dy, int count, int channels, int height, int width, int programs,
              float* __restrict__ found
#if LOWS
              ,
              float* __restrict__ lows
#endif
) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const int first_of_dy = BASE ? 0 : channels;
  const Images images = {count, height, width, channels + first_of_dy};
  const int chunks = (channels + CHUNK - 1) / CHUNK;
  const int pairs = (height + 1) / 2, squares = (width + 1) / 2;
  const int chunk = int(blockIdx.x) % chunks * CHUNK, number = int(blockIdx.x) / chunks;
  const int tiles = (width + WIDTH - 1) / WIDTH * ((count + IMAGES - 1) / IMAGES);
  const Offset all = Offset(tiles) * pairs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = chunk + lane;

  Walk walk = {int(all * number / programs), int(all * (number + 1) / programs)};
  if (walk.more()) walk.enter(images);

#if BOXED
  Barrier* const full = reinterpret_cast<Barrier*>(shared + STAGES * STAGE);
  Barrier* const empty = full + STAGES;
  make_stages<STAGES>(full, empty, WARPS, THREADS);
  // The barriers around what warps leave.
  auto meet = [] {
#pragma unroll 1
    for (int i = 0; i < 2 * ROUNDS; i++) __syncthreads();
  };
  if (warp >= THREADS / 32) {
    if (SHARED_OUT) registers_less<24>();
    if (threadIdx.x == THREADS) {
      int slot = 0;
      unsigned phase = 1;  // Stages begin as empty ones.
#pragma unroll 1
      for (; walk.more(); walk.advance(images)) {
        const bool inside = walk.pair >= R, ahead = walk.pair < walk.bottom;
        unsigned char* stage = shared + slot * STAGE;
        wait_for(empty + slot, phase);
        expect(full + slot, (inside ? BYTES : 0) + (ahead ? OUT_BYTES : 0));
        if (inside)
          load_box(stage, x, full + slot, chunk, walk.left - HALO, 2 * (walk.pair - R), walk.image);
        if (ahead)
          load_box(stage + BYTES, dy, full + slot, first_of_dy + chunk, walk.left, 2 * walk.pair,
                   walk.image);
        if (++slot == STAGES) {
          slot = 0;
          phase ^= 1;
        }
      }
    }
    __syncwarp();
    meet();
    return;
  }
  if (SHARED_OUT) registers_more<240>();
  if (warp >= WARPS) {
    meet();
    return;
  }
#else
  const int mine = chunk + int(threadIdx.x) % PIECES * VECTOR;
  const Copies copies = {mine, channels - mine};
  Walk loading = walk;
  auto load = [&](int slot) {
    if (loading.more()) {
      unsigned char* stage = shared + slot * STAGE;
      if (loading.pair >= R)
        copies.start<2, LOADED>(x, images, loading.image, 2 * (loading.pair - R), loading.left - HALO,
                                stage);
      if (loading.pair < loading.bottom)
        copies.start<2, WIDTH>(dy + first_of_dy, images, loading.image, 2 * loading.pair,
                               loading.left, stage + BYTES);
      loading.advance(images);
    }
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) load(i);
#endif

  const int strip = warp % ACROSS * COLUMNS, of_image = warp / ACROSS;
  const int from = (2 * of_image * LOADED + strip) * CHUNK + lane;
  const int from_dy = BYTES / 4 + (2 * of_image * WIDTH + strip) * CHUNK + lane;
  Gradients gradients;
  int slot = 0;
  unsigned phase = 0;
#pragma unroll 1
  for (; walk.more(); walk.leave(images)) {
    // Not a step's, where it would be a choice for each of its registers.
    gradients.clear();
#if LOWS
    const int image = walk.image + of_image, column = walk.left + strip;
    const int there = image < count && channel < channels ? width - column : 0;
    const Offset at = (Offset(image) * pairs + walk.pair) * squares + column / 2;
    float* low = lows + at * 2 * channels + channel;  // Of x, in the pair of dy.
    const int row = squares * 2 * channels;
    auto leave_low = [&](float* to, const float (&squares_of)[SQUARES]) {
#pragma unroll
      for (int s = 0; s < SQUARES; s++) {
        if (2 * s < there) to[s * 2 * channels] = 0.25f * squares_of[s];
      }
    };
#endif
#pragma unroll 1
    for (; walk.pair < walk.last; walk.pair++) {
#if BOXED
      wait_for(full + slot, phase);
#else
      wait<STAGES - 2>();
      // What this step reads is there, and nobody reads what is overwritten from here on.
      __syncthreads();
      load(slot == 0 ? STAGES - 1 : slot - 1);
#endif
      const float* stage = reinterpret_cast<const float*>(shared + slot * STAGE);
      const int above = walk.pair - R;
      float squares_of[SQUARES];
      gradients.push(walk.pair < walk.bottom ? stage + from_dy : nullptr, squares_of);
#if LOWS
      if (walk.pair < walk.bottom) leave_low(low + channels, squares_of);
#endif
      if (above >= 0) {
        gradients.multiply(stage + from, squares_of);
#if LOWS
        if (above >= walk.top && above < walk.bottom) leave_low(low - Offset(R) * row, squares_of);
#endif
      }
#if BOXED
      __syncwarp();
      if (lane == 0) arrive(empty + slot);
#endif
#if LOWS
      low += row;
#endif
      if (++slot == STAGES) {
        slot = 0;
        phase ^= 1;
      }
    }
  }
#if !BOXED
  wait<0>();
#endif

  float* const own = reinterpret_cast<float*>(shared) + lane;
  float* const to = found + Offset(number) * SUMS * channels + channel;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PART; i++) {
      if (round * PART + i < SUMS)
        own[(warp * PART + i) * CHUNK] = gradients.sums[round * PART + i < SUMS ? round * PART + i : 0];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < PART && round * PART + i < SUMS; i += WARPS) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += own[(w * PART + i) * CHUNK];
      if (channel < channels) to[Offset(round * PART + i) * channels] = sum;
    }
  }
}
