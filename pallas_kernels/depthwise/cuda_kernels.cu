// Depthwise convolutions of 16-bit images [N, H, W, C] on tensor cores, for NVRTC.
//
// A channel's convolution is a product of matrices. M: 16 blocks of four columns of one pair of
// rows. K: a pair of rows of the pixels that such a block reads. N: its four columns of a pair of
// rows of the output. So the taps are a Toeplitz matrix, and pairs of rows stream through: each is
// multiplied for all pairs of the output that it reaches, whose sums wait in registers. Blocks lie
// beside each other and, where images are narrow, in several images.
//
// The weight gradient has the pixels that a block reads as M, the pair of rows of dy as N, and the
// 16 blocks as K: sums of the products of each pixel with each, of which some belong to a tap. They
// are added up in a fixed order.
//
// A thread block takes 32 channels, a warp four of them; it goes through tiles of some images, a
// strip of rows and at most 64 columns. Hopper copies pairs of rows as boxes by TMA, older GPUs in
// pieces of up to 16 bytes a thread.
//
// Arithmetic is that of the tensor cores: products of 16-bit numbers, summed in float32. A pixel
// that is Inf or NaN is multiplied by zeros of the Toeplitz matrix too: it makes NaN of the block's
// four columns and pair of rows wherever its matrix reaches.
//
// The host defines these macros:
//   BFLOAT16         1 bfloat16, 0 float16
//   KERNEL_SIZE      1 to 9
//   HEIGHT, WIDTH, CHANNELS  of the images
//   BLOCKS, IMAGES   blocks beside each other, images: their product is at most 16
//   COLUMNS          columns of a tile, at most 4 * BLOCKS
//   PAIRS            pairs of rows of a tile
//   STAGES           pairs of rows in shared memory, at least 2
//   RESIDENT         thread blocks that a multiprocessor shall have
//   BOXED            1 TMA, 0 no TMA
//   VECTOR           channels that an access to memory takes without TMA: 8, 4, 2, 1, divides C
//   BIASED           1 if there is a bias, or its gradient is asked for
//   TRANSPOSED       1 the adjoint's taps
//   WEIGHTS          1 the weight gradient, whose BLOCKS * IMAGES is 16 and COLUMNS 4 * BLOCKS
#include "../common/tensor_cores.cuh"

constexpr int BEFORE = (KERNEL_SIZE - 1) / 2;    // Taps above, and left of, a pixel.
constexpr int REACH = KERNEL_SIZE > 5 ? 2 : 1;   // Pairs of rows that a pair reads to each side.
constexpr int REACHED = 2 * REACH + 1;           // Pairs of the output that a pair is multiplied for.
constexpr int HALO = 2 * REACH;                  // Columns that a block reads to each side.
constexpr int PARTS = 1 + REACH;                 // Times four columns that a block reads.
constexpr int STEPS = PAIRS + 2 * REACH;
constexpr int CHUNKS = (CHANNELS + CHUNK - 1) / CHUNK;
constexpr int GROUP = 4;                         // Channels of a warp.
constexpr int WARPS = CHUNK / GROUP, THREADS = 32 * WARPS;

// Columns that are loaded: a multiple of eight pixels, after which swizzles repeat.
constexpr int LOADED = (4 * BLOCKS + 2 * HALO + 7) / 8 * 8;
constexpr int ROW = LOADED * PIXEL;
constexpr int STAGE = 2 * ROW * IMAGES;
constexpr int RESULT = (2 * COLUMNS * PIXEL * IMAGES + 1023) / 1024 * 1024;

#if !BOXED
template <int> struct Pieces;
template <> struct Pieces<8> { typedef Eight Type; };
template <> struct Pieces<4> { typedef Four Type; };
template <> struct Pieces<2> { typedef unsigned Type; };
template <> struct Pieces<1> { typedef Scalar Type; };
typedef Pieces<VECTOR>::Type Piece;  // What a thread copies at once.
#endif

// The pairs of rows that a thread block goes through, tile by tile. Neighbouring thread blocks take
// neighbouring channels of the same tile.
struct Walk {
  static constexpr int ACROSS = (WIDTH + COLUMNS - 1) / COLUMNS;
  static constexpr int DOWN = (HEIGHT + 2 * PAIRS - 1) / (2 * PAIRS);

  int tile = blockIdx.x / CHUNKS, step = 0;

  DEVICE static int tiles(int images) { return ACROSS * DOWN * ((images + IMAGES - 1) / IMAGES); }
  DEVICE static int channel() { return blockIdx.x % CHUNKS * CHUNK; }

  // The place of the pair that is read, without its halo of columns.
  DEVICE int column() const { return tile % ACROSS * COLUMNS; }
  DEVICE int row() const { return 2 * (PAIRS * (tile / ACROSS % DOWN) + step - REACH); }
  DEVICE int image() const { return tile / ACROSS / DOWN * IMAGES; }

  DEVICE void next() {
    if (++step < STEPS) return;
    step = 0;
    tile += gridDim.x / CHUNKS;
  }
};

#if !BOXED
// Starts to copy WIDE columns of a pair of rows of images to shared memory, zeros outside of them.
template <int WIDE>
DEVICE void load_rows(const Scalar* __restrict__ x, unsigned char* stage, int channel, int column,
                      int row, int image, int images) {
  constexpr int PIECES = CHUNK / VECTOR, ITEMS = 2 * IMAGES * WIDE * PIECES;
#pragma unroll 1
  for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
    const int piece = item % PIECES, pixel = item / PIECES, line = pixel / WIDE;
    const int n = image + line / 2, r = row + line % 2, w = column + pixel % WIDE;
    const int c = channel + piece * VECTOR;
    const bool inside =
        n < images && r >= 0 && r < HEIGHT && w >= 0 && w < WIDTH && c < CHANNELS;
    unsigned char* to = stage + swizzled(PIXEL * pixel + int(sizeof(Scalar)) * VECTOR * piece);
    // An address that is not read is x's own.
    const Scalar* from = inside ? x + ((Offset(n) * HEIGHT + r) * WIDTH + w) * CHANNELS + c : x;
#if VECTOR == 1
    *reinterpret_cast<Scalar*>(to) = inside ? *from : Scalar(0);
#else
    copy<sizeof(Scalar) * VECTOR>(to, from, inside);
#endif
  }
}
#endif

#if WEIGHTS

// Products of a pair with all pairs of dy that reach it. Two pairs' columns beyond the first eight
// are one more: those of dy's offsets 1 and 0, 3 and 2, and 4.
constexpr int MORE = REACH == 2 ? 3 : 0, PRODUCTS = REACHED + MORE;

// The number, among all rows of all products, of a pixel of x at an offset of pairs.
DEVICE int place(int offset, int row, int column) {
  if (column < 8) return 16 * offset + 8 * row + column;
  const int product = REACHED + offset / 2, second = offset < 4 && offset % 2 == 0;
  return 16 * product + 8 * second + 4 * row + column - 8;
}

// The weight gradient: [thread blocks of a channel, C, KERNEL_SIZE * KERNEL_SIZE + BIASED], of which
// the last is the sum of dy.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
depthwise_weights(
#if BOXED
    BOXES x, BOXES dy,
#else
    const Scalar* __restrict__ x, const Scalar* __restrict__ dy,
#endif
    int images, float* __restrict__ sums) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  constexpr int BOTH = STAGE + RESULT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = Walk::tiles(images);
  Walk here, ahead;

#if BOXED
  Barrier* const full = reinterpret_cast<Barrier*>(shared + STAGES * BOTH);
  Barrier* const done = full + STAGES;
  make_stages<STAGES>(full, done, WARPS, 0);
  auto fill = [&](int slot) {
    if (ahead.tile >= tiles) return;
    unsigned char* stage = shared + slot * BOTH;
    expect(full + slot, ahead.step < PAIRS ? BOTH : STAGE);
    load_box(stage, x, full + slot, ahead.channel(), ahead.column() - HALO, ahead.row(), ahead.image());
    if (ahead.step < PAIRS)
      load_box(stage + STAGE, dy, full + slot, ahead.channel(), ahead.column(), ahead.row() + 2 * REACH,
               ahead.image());
    ahead.next();
  };
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) fill(i);
#else
  auto fill = [&](int slot) {
    if (ahead.tile < tiles) {
      unsigned char* stage = shared + slot * BOTH;
      load_rows<LOADED>(x, stage, ahead.channel(), ahead.column() - HALO, ahead.row(), ahead.image(), images);
      if (ahead.step < PAIRS)
        load_rows<COLUMNS>(dy, stage + STAGE, ahead.channel(), ahead.column(), ahead.row() + 2 * REACH,
                         ahead.image(), images);
      ahead.next();
    }
    commit();
  };
  for (int i = 0; i < STAGES - 1; i++) fill(i);
#endif

  // Where this thread reads of blocks t + 4e + 8f, which K has as 2t + e + 8f.
  int from[2][2], beyond[2][2], from_dy[2][2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
#pragma unroll
    for (int f = 0; f < 2; f++) {
      const int block = t + 4 * e + 8 * f, image = block / BLOCKS, column = block % BLOCKS * 4;
      const int group = 2 * GROUP * warp;
      from[e][f] = swizzled(PIXEL * (image * 2 * LOADED + column + g) + group);
      beyond[e][f] =
          swizzled(PIXEL * ((image * 2 + g / 4) * LOADED + column + 8 + g % 4) + group);
      from_dy[e][f] = swizzled(PIXEL * ((image * 2 + g / 4) * COLUMNS + column + g % 4) + group);
    }
  }

  float products[GROUP][PRODUCTS][4] = {}, totals[GROUP] = {};
  // Pairs of dy, and of x's columns beyond. At the end of a tile those of dy are zeros.
  unsigned late[GROUP][REACHED][2] = {}, before[GROUP][2] = {};
  int slot = 0;
  unsigned phase = 0;
  bool begun = false;
#pragma unroll 1
  for (; here.tile < tiles; here.next()) {
#if BOXED
    wait_for(full + slot, phase);
#else
    wait<STAGES - 2>();
    // What this step reads is there, and nobody reads what is overwritten from here on.
    __syncthreads();
    fill(slot ? slot - 1 : STAGES - 1);
#endif
    const unsigned char* stage = shared + slot * BOTH;
    Four pixels[2][2][2], more[2][2], gradients[2][2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int f = 0; f < 2; f++) {
#pragma unroll
        for (int r = 0; r < 2; r++)
          pixels[r][e][f] = *reinterpret_cast<const Four*>(stage + r * ROW + from[e][f]);
        if (MORE) more[e][f] = *reinterpret_cast<const Four*>(stage + beyond[e][f]);
        gradients[e][f] = Four{0, 0};
        if (here.step < PAIRS)
          gradients[e][f] = *reinterpret_cast<const Four*>(stage + STAGE + from_dy[e][f]);
        if (BIASED) {
          totals[0] += number_of(gradients[e][f].low);
          totals[1] += number_of(gradients[e][f].low >> 16);
          totals[2] += number_of(gradients[e][f].high);
          totals[3] += number_of(gradients[e][f].high >> 16);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
      unsigned a[2][2], next[2];
#pragma unroll
      for (int f = 0; f < 2; f++) {
#pragma unroll
        for (int r = 0; r < 2; r++) a[r][f] = of_channel(c, pixels[r][0][f], pixels[r][1][f]);
        if (MORE) next[f] = of_channel(c, more[0][f], more[1][f]);
#pragma unroll
        for (int i = REACHED - 1; i > 0; i--) late[c][i][f] = late[c][i - 1][f];
        late[c][0][f] = of_channel(c, gradients[0][f], gradients[1][f]);
      }
#pragma unroll
      for (int i = 0; i < REACHED; i++)
        multiply16(products[c][i], a[0][0], a[1][0], a[0][1], a[1][1], late[c][i][0], late[c][i][1],
                   products[c][i]);
#pragma unroll
      for (int i = 0; i < MORE; i++) {
        const int at = i < 2 ? 2 * i + 1 : 4;
        multiply16(products[c][REACHED + i], next[0], before[c][0], next[1], before[c][1],
                   late[c][at][0], late[c][at][1], products[c][REACHED + i]);
      }
      if (MORE) {
        before[c][0] = next[0];
        before[c][1] = next[1];
      }
    }
#if BOXED
    __syncwarp();
    if (lane == 0) arrive(done + slot);
    // The slot of the step before, so that nobody waits for this one's.
    if (threadIdx.x == 0 && begun) {
      const int last = slot ? slot - 1 : STAGES - 1;
      wait_for(done + last, slot ? phase : phase ^ 1);
      fill(last);
    }
    __syncwarp();
#endif
    begun = true;
    if (++slot == STAGES) {
      slot = 0;
      phase ^= 1;
    }
  }
  __syncthreads();

  float* const own = reinterpret_cast<float*>(shared) + warp * (PRODUCTS * 128 + 32);
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
#pragma unroll
    for (int i = 0; i < PRODUCTS; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++)
        own[(i * 16 + g + k / 2 * 8) * 8 + 2 * t + k % 2] = products[c][i][k];
    }
    own[PRODUCTS * 128 + lane] = totals[c];
    __syncwarp();
    const int channel = here.channel() + GROUP * warp + c;
    if (channel < CHANNELS) {
      constexpr int TAPS = KERNEL_SIZE * KERNEL_SIZE;
      for (int tap = lane; tap < TAPS + BIASED; tap += 32) {
        const int i = tap / KERNEL_SIZE - BEFORE, j = tap % KERNEL_SIZE - BEFORE;
        float sum = 0.0f;
        for (int n = 0; n < 32 && tap == TAPS; n++) sum += own[PRODUCTS * 128 + n];
        for (int n = 0; n < 8 && tap < TAPS; n++) {
          // Of a pixel of dy the pixel of x that the tap multiplies.
          const int row = i + n / 4 + 2 * REACH, column = j + n % 4 + HALO;
          sum += own[place(row / 2, row % 2, column) * 8 + n];
        }
        sums[(Offset(blockIdx.x / CHUNKS) * CHANNELS + channel) * (TAPS + BIASED) + tap] = sum;
      }
    }
    __syncwarp();
  }
}

#else

// What is added to the channels of a warp.
struct alignas(16) Offsets {
  float of[GROUP];
};

// The taps of four channels between a pixel of the output and one of x, zeros beyond the kernel.
DEVICE Four taps_between(const Scalar* __restrict__ taps, int down, int right, int channel) {
  const int i = BEFORE + (TRANSPOSED ? -down : down), j = BEFORE + (TRANSPOSED ? -right : right);
  if (i < 0 || i >= KERNEL_SIZE || j < 0 || j >= KERNEL_SIZE) return Four{0, 0};
  const Scalar* at = taps + (i * KERNEL_SIZE + j) * CHANNELS + channel;
#if VECTOR >= 4
  return channel < CHANNELS ? *reinterpret_cast<const Four*>(at) : Four{0, 0};
#else
  unsigned each[GROUP];
#pragma unroll
  for (int c = 0; c < GROUP; c++) each[c] = channel + c < CHANNELS ? at[c] : 0;
  return Four{each[0] | each[1] << 16, each[2] | each[3] << 16};
#endif
}

// The convolution. Taps are `[KERNEL_SIZE, KERNEL_SIZE, C]`; the bias is `[C]`, or null.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
depthwise_forward(
#if BOXED
    BOXES x,
#else
    const Scalar* __restrict__ x,
#endif
    const Scalar* __restrict__ taps, const float* __restrict__ bias, int images,
#if BOXED
    BOXES y
#else
    Scalar* __restrict__ y
#endif
) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  unsigned char* const results = shared + STAGES * STAGE;
  // A stage that is full says that the results of its last use were read, see `retire`.
  constexpr int BUFFERS = BOXED ? STAGES + 1 : 2;
  Offsets* const offsets = reinterpret_cast<Offsets*>(results + BUFFERS * RESULT);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = Walk::tiles(images);
  Walk here, ahead, behind;

#if BOXED
  Barrier* const full = reinterpret_cast<Barrier*>(offsets + WARPS);
  Barrier* const done = full + STAGES;
  make_stages<STAGES>(full, done, WARPS, 0);
  auto fill = [&](int slot) {
    if (ahead.tile >= tiles) return;
    expect(full + slot, STAGE);
    load_box(shared + slot * STAGE, x, full + slot, ahead.channel(), ahead.column() - HALO, ahead.row(),
             ahead.image());
    ahead.next();
  };
  // Stores the results of the oldest step that was not, and fills its stage anew: one thread, a step
  // after all warps did that, so that it seldom waits for them.
  int oldest = 0, stored_buffer = 0;
  unsigned oldest_phase = 0;
  auto retire = [&]() {
    wait_for(done + oldest, oldest_phase);
    if (behind.step >= 2 * REACH) {
      store_box(y, behind.channel(), behind.column(), behind.row() - 2 * REACH, behind.image(),
                results + stored_buffer * RESULT);
      if (++stored_buffer == BUFFERS) stored_buffer = 0;
    }
    stored<1>();
    fill(oldest);
    if (++oldest == STAGES) {
      oldest = 0;
      oldest_phase ^= 1;
    }
    behind.next();
  };
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) fill(i);
#else
  auto fill = [&](int slot) {
    if (ahead.tile < tiles) {
      load_rows<LOADED>(x, shared + slot * STAGE, ahead.channel(), ahead.column() - HALO, ahead.row(),
                        ahead.image(), images);
      ahead.next();
    }
    commit();
  };
  // Stores the results that the step before has left.
  auto retire = [&]() {
    if (behind.step >= 2 * REACH) {
      constexpr int PIECES = CHUNK / VECTOR, ITEMS = 2 * IMAGES * COLUMNS * PIECES;
      const unsigned char* result = results + behind.step % 2 * RESULT;
#pragma unroll 1
      for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
        const int piece = item % PIECES, pixel = item / PIECES, line = pixel / COLUMNS;
        const int n = behind.image() + line / 2, r = behind.row() - 2 * REACH + line % 2;
        const int w = behind.column() + pixel % COLUMNS, c = behind.channel() + piece * VECTOR;
        if (n >= images || r >= HEIGHT || w >= WIDTH || c >= CHANNELS) continue;
        const unsigned char* from =
            result + swizzled(PIXEL * pixel + int(sizeof(Scalar)) * VECTOR * piece);
        Scalar* to = y + ((Offset(n) * HEIGHT + r) * WIDTH + w) * CHANNELS + c;
        *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
      }
    }
    behind.next();
  };
  for (int i = 0; i < STAGES - 1; i++) fill(i);
#endif

  // This thread's column of its two blocks: the pixels and, four columns further, the next ones.
  int from[2][2], to[2][2];
  bool kept[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int block = lane / 4 + 8 * h, column = block % BLOCKS * 4 + lane % 4;
    const int image = block / BLOCKS < IMAGES ? block / BLOCKS : 0;
    kept[h] = block / BLOCKS < IMAGES && column < COLUMNS;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      from[h][i] = swizzled(PIXEL * (image * 2 * LOADED + column + 4 * i) + 2 * GROUP * warp);
      to[h][i] = swizzled(PIXEL * ((image * 2 + i) * COLUMNS + column) + 2 * GROUP * warp);
    }
  }

  const int first = here.channel() + GROUP * warp;
  // In shared memory, since registers are few. A warp writes and reads its own.
  if (BIASED && lane < GROUP)
    offsets[warp].of[lane] = first + lane < CHANNELS ? bias[first + lane] : 0.0f;
  __syncwarp();
  // N counts columns and rows of the output, K those of x, rows fastest.
  unsigned matrix[GROUP][REACHED * PARTS];
#pragma unroll
  for (int pair = 0; pair < REACHED; pair++) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int down = 2 * (pair - REACH) - lane / 4 % 2;
      const int right = lane % 4 + 4 * part - HALO - lane / 8;
      const Four upper = taps_between(taps, down, right, first);
      const Four lower = taps_between(taps, down + 1, right, first);
#pragma unroll
      for (int c = 0; c < GROUP; c++) matrix[c][pair * PARTS + part] = of_channel(c, upper, lower);
    }
  }

  // The sums of the output's pairs that wait for i more pairs. A tile's first ones, which have not
  // seen all of theirs, are not stored.
  float sums[GROUP][REACHED][4] = {};
  int slot = 0, buffer = 0;
  unsigned phase = 0;
  bool begun = false;
#pragma unroll 1
  for (; here.tile < tiles; here.next()) {
#if BOXED
    wait_for(full + slot, phase);
#else
    wait<STAGES - 2>();
    // What this step reads is there, and nobody reads what is overwritten from here on.
    __syncthreads();
    fill(slot ? slot - 1 : STAGES - 1);
    if (begun) retire();
    buffer = here.step % 2;
#endif
    Four pixels[2][2][PARTS];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          pixels[h][r][part] = *reinterpret_cast<const Four*>(
              shared + slot * STAGE + r * ROW + from[h][part % 2] + part / 2 * 8 * PIXEL);
      }
    }
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
      unsigned a[PARTS][2];
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int h = 0; h < 2; h++)
          a[part][h] = of_channel(c, pixels[h][0][part], pixels[h][1][part]);
      }
#pragma unroll
      for (int i = 0; i < REACHED; i++) {
        const unsigned* b = matrix[c] + (REACHED - 1 - i) * PARTS;
        float before[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
          before[k] = i + 1 < REACHED ? sums[c][(i + 1) % REACHED][k] : 0.0f;
        multiply16(sums[c][i], a[0][0], a[0][1], a[1][0], a[1][1], b[0], b[1], before);
        if (PARTS == 3)
          multiply8(sums[c][i], a[PARTS - 1][0], a[PARTS - 1][1], b[PARTS - 1], sums[c][i]);
      }
    }
    if (here.step >= 2 * REACH) {
      Offsets added;
      if (BIASED) added = offsets[warp];
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float out[GROUP];
#pragma unroll
          for (int c = 0; c < GROUP; c++)
            out[c] = sums[c][0][2 * h + r] + (BIASED ? added.of[c] : 0.0f);
          if (kept[h])
            *reinterpret_cast<Four*>(results + buffer * RESULT + to[h][r]) =
                Four{packed(out[0], out[1]), packed(out[2], out[3])};
        }
      }
#if BOXED
      if (++buffer == BUFFERS) buffer = 0;
#endif
    }
#if BOXED
    publish();
    __syncwarp();
    if (lane == 0) arrive(done + slot);
    if (threadIdx.x == 0 && begun) retire();
    __syncwarp();
#endif
    begun = true;
    if (++slot == STAGES) {
      slot = 0;
      phase ^= 1;
    }
  }
#if BOXED
  if (threadIdx.x != 0) return;
  if (begun) retire();
  stored<0>();
#else
  __syncthreads();
  if (begun) retire();
#endif
}

#endif
