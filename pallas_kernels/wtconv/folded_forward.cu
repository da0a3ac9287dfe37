// A level of the wavelet convolution of 16-bit images [N, H, W, C] on tensor cores, for NVRTC.
//
// Each pair of rows is multiplied for all pairs of the output that it reaches, whose sums wait in
// registers.
//
// The host defines these macros, beside those of `folded_streams.cuh`:
//   BELOW            of BOXED whether something is added to squares
//   APART            of BOXED whether a warp of its own starts the copies
//   AHEAD            of APART whether pixels are read a step before they are multiplied

#include "folded_streams.cuh"

// The sums of all pairs of the output that wait, those that wait longest first. The last of each
// channel's stay zero: the pair of the output that a pair is the first for.
typedef float Sums[GROUP][REACHED + 1][4];

// The pixels of a thread: of two blocks, rows, and the columns of the parts.
typedef Channels Block[2][2][PARTS];

// Reads a pair of rows. `from` are the places of this thread's column in two blocks, and four columns
// further; rows and eight columns are so many bytes apart.
DEVICE void read_pair(const unsigned char* rows, const int (&from)[2][2], int row, int eight,
                      Block& pixels) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        pixels[h][r][part] = channels_at(rows + from[h][part % 2] + r * row + part / 2 * eight);
    }
  }
}

// Multiplies a pair of rows for all pairs of the output that it reaches, which then wait for one
// less.
DEVICE void add_pair(const Block& pixels, const Matrix& matrix, Sums& sums) {
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
DEVICE Channels finished(const Sums& sums, int k, const float (&biases)[GROUP],
                         const Channels& under) {
  Channels out;
#pragma unroll
  for (int c = 0; c < GROUP; c += 2) {
    const unsigned word = under.words[c / 2];
    out.words[c / 2] =
        packed(sums[c][0][k] + (biases[c] + number_of(Scalar(word))),
               sums[c + 1][0][k] + (biases[c + 1] + number_of(Scalar(word >> 16))));
  }
  return out;
}

#if !BOXED

// The sums that are added to a square of four pixels, of the row of a pair.
constexpr int BELOW_PIXELS = 2 * BLOCKS;
constexpr int BELOW_GROUP = group_bytes(BELOW_PIXELS);
constexpr int STAGE = Inputs::BYTES + GROUPS * BELOW_GROUP;

// A thread block makes TOGETHER channels of one tile after another. Taps are those of all levels, of
// which this one is `level`: its pixels are every `stride`-th row and column of y. Of those of
// `below`, which is y, the first of each square is what deeper levels add to the square: it is read
// before that square is written, by the same block. It may be null.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
folded_forward(const Scalar* __restrict__ x, const unsigned* __restrict__ taps,
               const Scalar* below, int level, int count, int channels, int height, int width,
               int programs, int high, int broad, Scalar* y) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  unsigned char* const results = shared + STAGES * STAGE;
  const Images images = {count, height, width, channels}, whole = {count, high, broad, channels};
  const int chunks = (channels + TOGETHER - 1) / TOGETHER, tiles = Walk::tiles(images);
  const int chunk = int(blockIdx.x) % chunks * TOGETHER, begin = int(blockIdx.x) / chunks;
  const int pairs = (height + 1) / 2, squares = (width + 1) / 2, stride = 1 << level;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  Matrix matrix;
  load_taps(taps, level, chunk + GROUP * warp, channels, matrix);
  float biases[GROUP];
  load_biases(taps, level, chunk + GROUP * warp, channels, biases);

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
  inputs.prepare(images, -HALO, 1);
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
        over_at = whole.pixel(image, 0, 2 * column, stride) + mine;
      }
      unsigned char* stage = shared + slot * STAGE;
      const Scalar* at = x + loading.pixel(images, loading.pair, 1) + mine;
      if (loading.pair < pairs)
        inputs.load(x, at, inputs.inside(images, loading.pair), left, stage);
      const int done = loading.pair - R;
      if (over_there && done >= loading.top)
        copy_pixel(x, below + over_at + whole.pixel(0, 2 * done, 0, stride), true, left,
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
  outputs.prepare(whole, 0, stride);
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
      Block pixels;
      read_pair(stage, from, 2 * GROUP * LOADED, 16 * GROUP, pixels);
      add_pair(pixels, matrix, sums);
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
          const Channels out = finished(sums, 2 * h + r, biases, under);
          if (lane / 4 + 8 * h < BLOCKS)
            *reinterpret_cast<Channels*>(result + to[h] + 2 * GROUP * r * WIDTH) = out;
        }
      }
      stored = outputs.inside(images, done);
      stored_at = walk.pixel(whole, done, stride) + mine;
    }
    if (++walk.pair == walk.bottom(images) + R) {
      walk.tile += programs;
      walk.enter(images);
    }
    if (++slot == STAGES) slot = 0;
  }
}

#else

constexpr int ROW = BOX * PIXEL, ROWS = 2 * ROW * IMAGES;
constexpr int SQUARES = BELOW ? 2 * BLOCKS * PIXEL : 0;  // What is below a pair of rows.
constexpr int STAGE = ROWS + (SQUARES + 1023) / 1024 * 1024;
constexpr int RESULT = (2 * WIDTH * PIXEL * IMAGES + 1023) / 1024 * 1024;
// A stage that is full says that the results of its last use were read, see `retire`.
constexpr int BUFFERS = STAGES + 1;

// The same with copies of boxes, for which warps do not wait for one another. They are started by a
// thread of the first warp, or, APART, of a warp that does nothing else.
extern "C" __global__ void __launch_bounds__(THREADS + 128 * APART, RESIDENT)
folded_forward(BOXES x, const unsigned* __restrict__ taps,
#if BELOW
             BOXES below,
#endif
             int level, int count, int channels, int height, int width, int programs, BOXES y) {
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
  constexpr int COPIER = APART ? THREADS : 0;
  make_stages<STAGES>(full, done, GROUPS, COPIER);
#if APART
  if (warp >= GROUPS) {
    registers_less<40>();
    if (threadIdx.x != COPIER) return;
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) fill(i);
#pragma unroll 1
    while (storing.tile < tiles) retire();
    stored<0>();
    return;
  }
  registers_more<232>();
#else
  if (threadIdx.x == COPIER)
    for (int i = 0; i < STAGES; i++) fill(i);
#endif

  Matrix matrix;
  load_taps(taps, level, chunk + GROUP * warp, channels, matrix);
  float biases[GROUP];
  load_biases(taps, level, chunk + GROUP * warp, channels, biases);
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
  Block pixels;
  int slot = 0, buffer = 0;
  unsigned phase = 0;
#if AHEAD
  wait_for(full, 0);
  read_pair(shared, from, ROW, 8 * PIXEL, pixels);
#endif
#if !APART
  bool begun = false;
#endif
#pragma unroll 1
  while (walk.tile < tiles) {
    // Not a step's, where it would be a choice for each of the sums.
    clear(sums);
    const int last = walk.bottom(images) + R;
#pragma unroll 1
    for (; walk.pair < last; walk.pair++) {
      const unsigned char* stage = shared + slot * STAGE;
#if AHEAD
      Block ahead;
      const int next = slot + 1 == STAGES ? 0 : slot + 1;
      // Of a pair that is not in the image it is anything, and not multiplied.
      if (walk.pair + 1 < last || walk.tile + programs < tiles) {
        wait_for(full + next, next ? phase : phase ^ 1);
        read_pair(shared + next * STAGE, from, ROW, 8 * PIXEL, ahead);
      }
#else
      wait_for(full + slot, phase);
      if (walk.pair < pairs) read_pair(stage, from, ROW, 8 * PIXEL, pixels);
#endif
      if (walk.pair < pairs) {
        add_pair(pixels, matrix, sums);
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
            const Channels out = finished(sums, 2 * h + r, biases, under);
            if (lane / 4 + 8 * h < BLOCKS) *reinterpret_cast<Channels*>(result + to[h][r]) = out;
          }
        }
        if (++buffer == BUFFERS) buffer = 0;
      }
      publish();
      __syncwarp();
      if (lane == 0) arrive(done + slot);
#if !APART
      if (threadIdx.x == 0 && begun) retire();
      __syncwarp();
      begun = true;
#endif
      if (++slot == STAGES) {
        slot = 0;
        phase ^= 1;
      }
#if AHEAD
#pragma unroll
      for (int i = 0; i < 4 * PARTS; i++)
        pixels[i / 2 / PARTS][i / PARTS % 2][i % PARTS] =
            ahead[i / 2 / PARTS][i / PARTS % 2][i % PARTS];
#endif
    }
    walk.tile += programs;
    walk.enter(images);
  }
#if !APART
  if (threadIdx.x != 0) return;
  retire();
  stored<0>();
#endif
}

#endif
