// Weight gradients of a level of the folded wavelet convolution on tensor cores, for NVRTC.
//
// The host defines the macros of `folded_streams.cuh`, and
//   JOINED           whether x and dy are one array, in which dy's channels follow x's in each pixel

#include "folded_streams.cuh"

#if BFLOAT16
constexpr unsigned ONES = 0x3f803f80;
#else
constexpr unsigned ONES = 0x3c003c00;
#endif

static_assert(BLOCKS == 16, "all blocks are summed");
// Products of a channel: M is a pair of rows of eight columns of x, N a pair of rows of four columns
// of dy, K are the blocks. Of 5 x 5 the last four columns are those of two pairs of rows at once.
// The last product has the sums of dy, which a factor of ones makes.
constexpr bool MIXED = KERNEL_SIZE == 5;
constexpr int WHOLE = KERNEL_SIZE == 7 ? 2 : 1;
constexpr int SETS = WHOLE * REACHED + (MIXED ? 3 : 1);
constexpr int TAPS = KERNEL_SIZE * KERNEL_SIZE, FOLDED = 16 * TAPS;
// Floats from one square of 16 folded taps to the next, of which eight are in different banks.
constexpr int SQUARE = 20;
static_assert(SQUARE * TAPS <= 128 * SETS, "folded taps take the place of products");

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

// Numbers that one access to memory takes.
template <int COUNT>
struct alignas(4 * COUNT) Numbers {
  float at[COUNT];
};

// The gradients of a warp's channels from their products: the transpose of the fold. Lane l has those
// of taps l, l + 32, ...: of their bands, the first bit of which is the sign of rows, the second that
// of columns, and of the base.
struct Gradients {
  static constexpr int EACH = (TAPS + 31) / 32;
  float bands[EACH][4][GROUP], base[EACH][GROUP], bias[GROUP];

  // Makes those of channel c. `own` is memory of the warp's own, with results [SETS, 16 rows of M,
  // 8 columns of N], and then with the folded taps. `table [FOLDED]` has of each of these the two
  // results that it is the sum of, in the lower half and in the upper one.
  DEVICE void unfold(int c, float* own, const unsigned* __restrict__ table) {
    const int lane = threadIdx.x % 32;
    constexpr int FOLDS = (FOLDED + 31) / 32;
    float folded[FOLDS];
#pragma unroll
    for (int i = 0; i < FOLDS; i++) {
      const unsigned places = table[min(32 * i + lane, FOLDED - 1)];
      folded[i] = own[places & 0xffff] + own[places >> 16];
    }
    bias[c] = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; n++) bias[c] += own[(16 * (SETS - 1) + 8) * 8 + n];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < FOLDS; i++) {
      const int at = 32 * i + lane;
      if (at < FOLDED) own[place(at)] = folded[i];
    }
    __syncwarp();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int tap = min(32 * e + lane, TAPS - 1);
      const Numbers<4>* square = reinterpret_cast<const Numbers<4>*>(own + SQUARE * tap);
      // Sums where rows of input and output are the same or not, and columns: the first two bits of
      // a number are its rows, the others its columns.
      float sums[2][2] = {};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const Numbers<4> four = square[i];
        float(&of)[2] = sums[(i ^ i >> 1) & 1];
        of[0] += four.at[0] + four.at[3];
        of[1] += four.at[1] + four.at[2];
      }
#pragma unroll
      for (int band = 0; band < 4; band++) {
        const float same = band & 1 ? sums[0][0] - sums[0][1] : sums[0][0] + sums[0][1];
        const float other = band & 1 ? sums[1][0] - sums[1][1] : sums[1][0] + sums[1][1];
        bands[e][band][c] = band & 2 ? same - other : same + other;
      }
      base[e][c] = 0.0f;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int i = tap / KERNEL_SIZE + k / 2 + R, j = tap % KERNEL_SIZE + k % 2 + R;
        base[e][c] += own[place((i / 2 * 2 * KERNEL_SIZE + j) * 8 + k % 2 * 4 + k / 2 * 2 + i % 2)];
      }
    }
    __syncwarp();
  }

  static DEVICE int place(int folded) { return folded / 16 * SQUARE + folded % 16; }
};

// Stores a number of each channel of a group, of which `left` are there.
DEVICE void store_group(float* to, int left, const float (&numbers)[GROUP]) {
#pragma unroll
  for (int c = 0; c < GROUP; c += VECTOR) {
    Numbers<VECTOR> some;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) some.at[i] = numbers[c + i];
    if (c < left) *reinterpret_cast<Numbers<VECTOR>*>(to + c) = some;
  }
}

// Weight gradients of a level, `[programs, numbers, C]` from a row of `found [rows, C]` on, which
// other levels share: of bands as their tap and band have it, and where there are more numbers than
// these of the base, and of the bias. Those of bands are four times as large, where x and dy are means
// by what these stand for. The parameter without a name is what deeper levels have left, which were
// first, `found` itself or another array; it is not read.
extern "C" __global__ void __launch_bounds__(THREADS + 128 * APART, RESIDENT)
#if BOXED
folded_weights(BOXES x, BOXES dy,
#else
folded_weights(const Scalar* __restrict__ x, const Scalar* __restrict__ dy,
#endif
               const unsigned* __restrict__ table, const float*, int count, int channels, int height,
               int width, int programs, int numbers, int row, float* __restrict__ found) {
  SHARED(shared_memory);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(shared_memory);
  const int first_of_dy = JOINED ? channels : 0;
  const Images images = {count, height, width, channels + first_of_dy};
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
  auto end = [&](const Walk& of) { return min(of.bottom(images) + R, pairs + MIXED) + R; };
  auto advance = [&](Walk& at) {
    if (++at.pair < end(at)) return;
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
    const bool inside = loading.pair < loading.bottom(images);
    expect(full + slot, (other >= 0 ? ROWS : 0) + (inside ? 2 * WIDTH * PIXEL * IMAGES : 0));
    if (other >= 0)
      load_box(stage, x, full + slot, chunk, loading.left - HALO, 2 * other, loading.image);
    if (inside)
      load_box(stage + ROWS, dy, full + slot, first_of_dy + chunk, loading.left, 2 * loading.pair,
               loading.image);
    advance(loading);
  };
  constexpr int COPIER = APART ? THREADS : 0;
  make_stages<STAGES>(full, done, GROUPS, COPIER);
  unsigned phase = 0;
#if APART
  if (warp >= GROUPS) {
    registers_less<24>();
    if (threadIdx.x == COPIER) {
#pragma unroll 1
      for (int i = 0; i < STAGES; i++) load(i);
#pragma unroll 1
      for (int slot = 0; loading.tile < tiles;) {
        wait_for(done + slot, phase);
        load(slot);
        if (++slot == STAGES) {
          slot = 0;
          phase ^= 1;
        }
      }
    }
    // The one behind the loop.
    __syncthreads();
    return;
  }
  registers_more<240>();
#else
  if (threadIdx.x == COPIER)
    for (int i = 0; i < STAGES; i++) load(i);
  bool begun = false;
#endif
#else
  const int mine = chunk + GROUP * (int(threadIdx.x) % GROUPS), left = channels - mine;
  Inputs inputs;
  Outputs outputs;
  inputs.prepare(images, -HALO, 1);
  outputs.prepare(images, 0, 1);
  auto load = [&](int slot) {
    if (loading.tile < tiles) {
      if (loading.pair == loading.first()) {
        inputs.enter(images, loading.image, loading.left - HALO);
        outputs.enter(images, loading.image, loading.left);
      }
      unsigned char* stage = shared + slot * STAGE;
      const int other = loading.pair - R;
      if (other >= 0)
        inputs.load(x, x + loading.pixel(images, other, 1) + mine, inputs.inside(images, other), left,
                    stage);
      if (loading.pair < loading.bottom(images))
        outputs.load(dy, dy + loading.pixel(images, loading.pair, 1) + first_of_dy + mine,
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
    // Not a step's, where it would be a choice for each of its registers.
    products.begin();
    const int last = end(walk);
#pragma unroll 1
    for (; walk.pair < last; walk.pair++) {
#if BOXED
      wait_for(full + slot, phase);
#else
      wait<STAGES - 2>();
      __syncthreads();
      load(slot == 0 ? STAGES - 1 : slot - 1);
#endif
      const unsigned char* stage = shared + slot * STAGE;
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
#if !APART
      // The slot of the step before, so that nobody waits for this one's.
      if (threadIdx.x == 0 && begun) {
        const int before = slot ? slot - 1 : STAGES - 1;
        wait_for(done + before, slot ? phase : phase ^ 1);
        load(before);
      }
      __syncwarp();
      begun = true;
#endif
#endif
      if (++slot == STAGES) {
        slot = 0;
#if BOXED
        phase ^= 1;
#endif
      }
    }
    walk.tile += programs;
    walk.enter(images);
  }
#if !BOXED
  wait<0>();
#endif
  __syncthreads();

  float* const own = reinterpret_cast<float*>(shared) + warp * SETS * 128;
  Gradients gradients;
#pragma unroll
  for (int c = 0; c < GROUP; c++) {
#pragma unroll
    for (int i = 0; i < SETS; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++)
        own[(16 * i + g + k / 2 * 8) * 8 + 2 * t + k % 2] = products.sums[c][i][k];
    }
    __syncwarp();
    gradients.unfold(c, own, table);
  }
  const int channel = chunk + GROUP * warp, there = channels - channel;
  float* to = found + (Offset(first) * numbers + row) * channels + channel;
#pragma unroll
  for (int e = 0; e < Gradients::EACH; e++) {
    const int tap = 32 * e + lane;
    if (tap >= TAPS) break;
#pragma unroll
    for (int band = 0; band < 4; band++)
      store_group(to + Offset(4 * tap + band) * channels, there, gradients.bands[e][band]);
    if (numbers > 4 * TAPS)
      store_group(to + Offset(4 * TAPS + tap) * channels, there, gradients.base[e]);
  }
  if (numbers > 4 * TAPS && lane == 0)
    store_group(to + Offset(5 * TAPS) * channels, there, gradients.bias);
}
