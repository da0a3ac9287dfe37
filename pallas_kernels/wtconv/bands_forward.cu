// A level of the wavelet convolution of float32 images [N, H, W, C] with Haar wavelets, for NVRTC.
//
// A thread makes a strip of four columns of one channel, a warp 32 channels that lie beside each
// other. Pairs of rows stream through shared memory. Each is added to the sums of all pairs of the
// output that it reaches, which wait in registers beside all taps: no band is written anywhere. A
// square of two rows and columns is read once for the base convolution and for its four coefficients.
//
// A deeper level is the same, without a base, on the means of the squares of the level above; what it
// makes is added to all pixels of a square. Coefficients are unnormalised sums, whose factor is
// folded into the taps. The second level, HALVED, makes the means of x itself, and leaves those that
// deeper levels take.
//
// The host defines these macros:
//   KERNEL_SIZE      3 or 5
//   ACROSS           strips of an image in a tile
//   IMAGES           images of a tile; with ACROSS the warps that add
//   STAGES           pairs of rows in shared memory, at least 2
//   BASE             whether there is a base convolution, and a bias
//   BELOW            1 if something is added to squares, 2 if to squares of squares too
//   HALVED           whether x is the image whose means of squares are treated
//   LOWS             1 if the means of the squares of what is treated are made too, 2 if those of their
//                    squares are as well
//   VECTOR           channels that one copy to shared memory takes, a divisor of C
//   BOXED            whether four more warps copy boxes, by TMA, and give their registers to the others

#include "bands.cuh"

constexpr int SCALE = 1 + HALVED;                  // Rows and columns of x of a pixel that is treated.
constexpr int LINES = 2 * SCALE;                   // Rows of x of a pair.
constexpr int LOADED = SCALE * (WIDTH + 2 * HALO);  // Columns of x that it reads.
constexpr int ROW = CHUNK * LOADED;                // Elements of a row in shared memory.
// A stage: a pair of rows, what is added to the squares of the pair R above, and to their squares.
constexpr int BYTES = 4 * LINES * IMAGES * ROW;
constexpr int OVER = BELOW ? 4 * IMAGES * WIDTH / 2 * CHUNK : 0;
constexpr int FAR_OVER = BELOW == 2 ? 4 * IMAGES * ACROSS * CHUNK : 0;
// What reads the image above, as level 2 reads x, goes through its tiles from the last to the first:
// what made x, and level 1 of a call before, left the end of it in L2, and level 1 begins with the
// first.
constexpr bool BACKWARDS = HALVED;
constexpr float FACTOR = 0.25f / (SCALE * SCALE);  // Of a coefficient.
constexpr int STAGE = (BYTES + OVER + FAR_OVER + 1023) / 1024 * 1024;

// The pairs of rows that a thread block treats, tile after tile: a tile has all rows, of which the
// first and the last tile of a block may have a part.
struct Walk {
  int at, end;  // Pairs of the output, of all tiles.
  int image = 0, left = 0, top = 0, bottom = 0;
  int pair = 0;  // Of the input.

  DEVICE bool more() const { return at < end; }

  DEVICE void enter(const Images& images) {
    const int across = (images.width + WIDTH - 1) / WIDTH, pairs = (images.height + 1) / 2;
    const int tile = BACKWARDS ? (end - 1) / pairs : at / pairs;
    left = tile % across * WIDTH;
    image = tile / across * IMAGES;
    top = max(at - tile * pairs, 0);
    bottom = min(end - tile * pairs, pairs);
    pair = max(top - R, 0);
  }

  DEVICE int last() const { return bottom + R; }

  // Whether something is added to the pair that a step finishes.
  DEVICE bool covered() const { return BELOW && pair - R >= top; }

  // Goes on to the next pair that takes a stage: below the image are those that something is added to.
  DEVICE void advance(const Images& images) {
    const int pairs = (images.height + 1) / 2;
    if (++pair == (BELOW ? last() : min(last(), pairs))) leave(images);
  }

  DEVICE void leave(const Images& images) {
    const int treated = bottom - top;
    if (BACKWARDS) end -= treated;
    else at += treated;
    if (more()) enter(images);
  }
};

// The taps of a thread's channel.
struct Taps {
  float base[BASE ? K * K : 1], bands[4][K * K];

  // They are `[k, k, 1, C]` and `[k, k, 4, C]`, and turned around for the adjoint.
  DEVICE Taps(const float* __restrict__ of_base, const float* __restrict__ of_bands, int channel,
              int channels, int transpose) {
    const bool there = channel < channels;
#pragma unroll
    for (int i = 0; i < K * K; i++) {
      const int from = transpose ? K * K - 1 - i : i;
      if (BASE) base[i] = there ? of_base[from * channels + channel] : 0.0f;
#pragma unroll
      for (int b = 0; b < 4; b++)
        bands[b][i] = there ? FACTOR * of_bands[(4 * from + b) * channels + channel] : 0.0f;
    }
  }
};

constexpr int REACHED = K;           // Pairs of the output that a pair of coefficients is added to.
constexpr int ROWS = 2 * (R + 2);    // Rows of the output whose base waits.

// What waits, from the pair R before the last one that was added on.
struct Sums {
  float bands[REACHED][4][SQUARES];
  float base[BASE ? ROWS : 1][COLUMNS];

  DEVICE void clear(float offset) {
#pragma unroll
    for (int i = 0; i < REACHED; i++) {
#pragma unroll
      for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int s = 0; s < SQUARES; s++) bands[i][b][s] = 0.0f;
      }
    }
    if (!BASE) return;
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
#pragma unroll
      for (int o = 0; o < COLUMNS; o++) base[m][o] = offset;
    }
  }

  // Lets all wait for one pair less. The compiler lets the next additions write another register.
  DEVICE void shift(float offset) {
#pragma unroll
    for (int i = 0; i < REACHED; i++) {
#pragma unroll
      for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int s = 0; s < SQUARES; s++)
          bands[i][b][s] = i + 1 < REACHED ? bands[i + 1 < REACHED ? i + 1 : 0][b][s] : 0.0f;
      }
    }
    if (!BASE) return;
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
#pragma unroll
      for (int o = 0; o < COLUMNS; o++)
        base[m][o] = m + 2 < ROWS ? base[m + 2 < ROWS ? m + 2 : 0][o] : offset;
    }
  }

  // Adds a pair of rows, of which `rows` is this thread's first pixel that a strip reads. `lows` are
  // the sums of the strip's squares.
  DEVICE void add(const float* rows, const Taps& taps, float (&lows)[SQUARES]) {
#pragma unroll
    for (int j = 0; j < SQUARES + 2 * R; j++) {
      float pixels[2][2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float* from = rows + SCALE * (r * ROW + (2 * j + c) * CHUNK);
          pixels[r][c] = *from;
          if (HALVED) pixels[r][c] += from[CHUNK] + (from[ROW] + from[ROW + CHUNK]);
        }
      }
      if (BASE) add_base(pixels, 2 * j - HALO, taps);
      float square[4];
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
            bands[i][b][s] += square[b] * taps.bands[b][(K - 1 - i) * K + e];
        }
      }
    }
  }

  // The same of two columns for the base, the first of which is so far right of the strip's.
  DEVICE void add_base(const float (&pixels)[2][2], int column, const Taps& taps) {
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
            base[r + 3 * R - t][o] += pixels[r][c] * taps.base[t * K + e];
        }
      }
    }
  }

  // The pixels of the pair that waits for none, with what is added to its squares and to all of them.
  DEVICE void finished(const float (&under)[SQUARES], float far_under,
                       float (&pixels)[2][COLUMNS]) const {
#pragma unroll
    for (int s = 0; s < SQUARES; s++) {
      const float low = bands[0][0][s] + (under[s] + far_under), vertical = bands[0][1][s];
      const float horizontal = bands[0][2][s], diagonal = bands[0][3][s];
      const float upper = low + vertical, lower = low - vertical;
      const float beside0 = horizontal + diagonal, beside1 = horizontal - diagonal;
      pixels[0][2 * s] = upper + beside0;
      pixels[0][2 * s + 1] = upper - beside0;
      pixels[1][2 * s] = lower + beside1;
      pixels[1][2 * s + 1] = lower - beside1;
    }
    if (!BASE) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int o = 0; o < COLUMNS; o++) pixels[r][o] += base[r][o];
    }
  }
};

// Thread blocks of a number are those of all chunks of 32 channels, and share the pairs of all tiles
// with the other `programs`. `bases [k, k, 1, C]` and `bands [k, k, 4, C]` are taps; `below` and
// `deeper` are what is added to squares and to squares of squares; `bias [C]` may be null. Sizes are
// x's; `lows` and `far_lows` are the means of squares, and of squares of squares, of what is treated.
extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, 1)
bands_forward(INPUT x,
#if BASE
              const float* __restrict__ bases,
#endif
              const float* __restrict__ bands,
#if BELOW
              INPUT below,
#endif
#if BELOW == 2
              INPUT deeper,
#endif
#if BASE
              const float* __restrict__ bias,
#endif
              int count, int channels, int high, int wide, int programs, int transpose,
              float* __restrict__ y
#if LOWS
              ,
              float* __restrict__ lows
#endif
#if LOWS == 2
              ,
              float* __restrict__ far_lows
#endif
) {
#if !BASE
  const float *bases = nullptr, *bias = nullptr;
#endif
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const int height = (high + SCALE - 1) / SCALE, width = (wide + SCALE - 1) / SCALE;
  const Images images = {count, height, width, channels};
  const int chunks = (channels + CHUNK - 1) / CHUNK;
  const int pairs = (height + 1) / 2, squares = (width + 1) / 2;
  const int chunk = int(blockIdx.x) % chunks * CHUNK, number = int(blockIdx.x) / chunks;
  const int tiles = (width + WIDTH - 1) / WIDTH * ((count + IMAGES - 1) / IMAGES);
  const Offset all = Offset(tiles) * pairs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = chunk + lane;

  Walk walk = {int(all * number / programs), int(all * (number + 1) / programs)};
  if (!walk.more()) return;
  walk.enter(images);

#if BOXED
  Barrier* const full = reinterpret_cast<Barrier*>(shared + STAGES * STAGE);
  Barrier* const empty = full + STAGES;
  make_stages<STAGES>(full, empty, WARPS, THREADS);
  if (warp >= THREADS / 32) {
    if (SHARED_OUT) registers_less<24>();
    if (threadIdx.x != THREADS) return;
    int slot = 0;
    unsigned phase = 1;  // Stages begin as empty ones.
#pragma unroll 1
    for (; walk.more(); walk.advance(images)) {
      const int over = walk.pair - R;
      const bool there = walk.pair < pairs, covered = walk.covered();
      unsigned char* stage = shared + slot * STAGE;
      wait_for(empty + slot, phase);
      expect(full + slot, (there ? BYTES : 0) + (covered ? OVER + FAR_OVER : 0));
      if (there)
        load_box(stage, x, full + slot, chunk, SCALE * (walk.left - HALO), LINES * walk.pair,
                 walk.image);
#if BELOW
      if (covered) load_box(stage + BYTES, below, full + slot, chunk, walk.left / 2, over, walk.image);
#endif
#if BELOW == 2
      if (covered)
        load_box(stage + BYTES + OVER, deeper, full + slot, chunk, walk.left / 4, over / 2, walk.image);
#endif
      if (++slot == STAGES) {
        slot = 0;
        phase ^= 1;
      }
    }
    return;
  }
  if (SHARED_OUT) registers_more<240>();
  if (warp >= WARPS) return;
#else
  const int mine = chunk + int(threadIdx.x) % PIECES * VECTOR;
  const Copies copies = {mine, channels - mine};
  Walk loading = walk;
  auto load = [&](int slot) {
    if (loading.more()) {
      unsigned char* stage = shared + slot * STAGE;
      if (loading.pair < pairs)
        copies.start<LINES, LOADED>(x, {count, high, wide, channels}, loading.image,
                                    LINES * loading.pair, SCALE * (loading.left - HALO), stage);
#if BELOW
      if (loading.covered())
        copies.start<1, WIDTH / 2>(below, {count, pairs, squares, channels}, loading.image,
                                   loading.pair - R, loading.left / 2, stage + BYTES);
#endif
#if BELOW == 2
      if (loading.covered())
        copies.start<1, ACROSS>(deeper, {count, (pairs + 1) / 2, (squares + 1) / 2, channels},
                                loading.image, (loading.pair - R) / 2, loading.left / 4,
                                stage + BYTES + OVER);
#endif
      loading.advance(images);
    }
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) load(i);
#endif

  const Taps taps(bases, bands, channel, channels, transpose);
  const float offset = BASE && bias != nullptr && channel < channels ? bias[channel] : 0.0f;
  const int strip = warp % ACROSS * COLUMNS, of_image = warp / ACROSS;
  const int from = LINES * of_image * ROW + SCALE * strip * CHUNK + lane;
  const int over = (BYTES / 4 + (of_image * WIDTH / 2 + strip / 2) * CHUNK) + lane;
  const int far_over = (BYTES + OVER) / 4 + warp * CHUNK + lane;
  Sums sums;
  int slot = 0;
  unsigned phase = 0;
#pragma unroll 1
  for (; walk.more(); walk.leave(images)) {
    // Not a step's, where it would be a choice for each of the sums.
    sums.clear(offset);
    const int image = walk.image + of_image, column = walk.left + strip, last = walk.last();
    const int there = image < count && channel < channels ? width - column : 0;
    const Offset line = Offset(image) * height + 2 * walk.top;
    float* to = y + (line * width + column) * channels + channel;
#if LOWS
    const Offset own = Offset(image) * pairs + walk.pair;
    float* low = lows + (own * squares + column / 2) * channels + channel;
#endif
#if LOWS == 2
    const int fours = (squares + 1) / 2;
    const Offset far = Offset(image) * ((pairs + 1) / 2);
    float* far_low = far_lows + (far * fours + column / 4) * channels + channel;
    float upper = 0.0f;  // The squares of the pair above.
#endif
    auto enter = [&]() -> const float* {
#if BOXED
      wait_for(full + slot, phase);
#else
      wait<STAGES - 2>();
      // What this step reads is there, and nobody reads what is overwritten from here on.
      __syncthreads();
      load(slot == 0 ? STAGES - 1 : slot - 1);
#endif
      return reinterpret_cast<const float*>(shared + slot * STAGE);
    };
    float under[SQUARES] = {}, far_under = 0.0f;
    auto leave = [&](const float* stage) {
      if (walk.covered()) {
#pragma unroll
        for (int s = 0; s < SQUARES; s++) under[s] = stage[over + s * CHUNK];
        if (BELOW == 2) far_under = stage[far_over];
      }
#if BOXED
      __syncwarp();
      if (lane == 0) arrive(empty + slot);
#endif
      if (++slot == STAGES) {
        slot = 0;
        phase ^= 1;
      }
    };
    auto finish = [&]() {
      const int done = walk.pair - R;
      if (done < walk.top) return;
      float pixels[2][COLUMNS];
      sums.finished(under, far_under, pixels);
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int o = 0; o < COLUMNS; o++)
          if (o < there && 2 * done + r < height) to[(r * width + o) * channels] = pixels[r][o];
      }
      to += 2 * width * channels;
    };
    const int inside = min(last, pairs);
#pragma unroll 1
    for (; walk.pair < inside; walk.pair++) {
      const float* stage = enter();
      float squares_of[SQUARES];
      sums.shift(offset);
      sums.add(stage + from, taps, squares_of);
      leave(stage);
#if LOWS
      if (walk.pair >= walk.top && walk.pair < walk.bottom) {
#pragma unroll
        for (int s = 0; s < SQUARES; s++)
          if (2 * s < there) low[s * channels] = FACTOR * squares_of[s];
      }
      low += squares * channels;
#endif
#if LOWS == 2
      const int odd = walk.pair % 2;
      const float lower = squares_of[0] + squares_of[1];
      if ((odd || walk.pair == pairs - 1) && walk.pair >= walk.top && walk.pair < walk.bottom &&
          there > 0)
        far_low[Offset(walk.pair / 2) * fours * channels] =
            0.25f * FACTOR * (odd ? upper + lower : lower);
      upper = lower;
#endif
      finish();
    }
    // Pairs below the image add nothing.
#pragma unroll 1
    for (; walk.pair < last; walk.pair++) {
      sums.shift(offset);
      if (BELOW) leave(enter());
      finish();
    }
  }
}
