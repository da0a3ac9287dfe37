// The wavelet convolution of signals of either memory format, [N, L, C] or [N, C, L], with Haar
// wavelets, for NVRTC.
//
// A thread goes along a segment of one channel, a block of 32 samples after the other. A warp has 32
// channels beside each other, is a thread block, and waits for no other. What a level needs of the
// blocks before it keeps in registers; what it needs of those that follow it makes of their samples in
// shared memory, where copies arrive a block ahead. So all levels are one pass over memory, and no
// coefficient is written to it.
//
// Coefficients are unnormalised sums: level l holds 2^(l/2) times those of the transform. That factor,
// and the same one of the synthesis, are folded into the taps, exactly, as they are powers of two.
// Signals are zeros outside, and so are coefficients: odd lengths need no care.
//
// The host defines these macros:
//   FORWARD or WEIGHTS   the kernel to compile
//   DTYPE        0 float32, 1 bfloat16, 2 float16
//   KERNEL_SIZE  odd
//   LEVELS       0 to 5
//   CHANNELS_LAST  whether the channels of a sample are contiguous, else the samples of a channel
//   VECTOR       contiguous numbers that one access to memory takes, at most 16 bytes, a divisor of C
//                or of L
//   RESIDENT     warps of a multiprocessor, for which registers are to suffice

#include "../common/scalars.cuh"
#include "../common/copies.cuh"

#ifndef SHARED
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

constexpr int K = KERNEL_SIZE, R = K / 2;
constexpr int BANDS = 1 + 2 * LEVELS;     // The base's, then the low and the high one of each level.
constexpr int WARP = 32;                  // Channels.
constexpr int BLOCK = 32;                 // Samples.
constexpr int AHEAD = R << LEVELS;        // Samples beside a block that the deepest level reads.
constexpr int AROUND = (AHEAD + BLOCK - 1) / BLOCK;  // The same in blocks.
constexpr int SLOTS = AROUND + 2;         // Blocks of x in shared memory: a block, those ahead, the next.
constexpr int ACROSS = 32 / VECTOR;       // Pieces of the channels of a sample, or the other way round.
// Pieces that a thread copies without a branch: more are more addresses than there are registers for.
constexpr int UNROLLED = CHANNELS_LAST ? 8 : 2;
constexpr int SIXTEEN = 16 / sizeof(Scalar);
// Elements from a sample of 32 channels, or from a channel of 32 samples, to the next one: threads
// read the latter 16 bytes at a time, eight of them from different banks.
constexpr int PITCH = CHANNELS_LAST ? WARP : BLOCK + SIXTEEN;
constexpr int SLOT = 32 * PITCH;

template <int COUNT>
struct alignas(COUNT * sizeof(Scalar)) Piece {
  Scalar at[COUNT];
};

DEVICE constexpr int count_at(int level) { return BLOCK >> level; }

// The factor of both transforms of a band's level.
DEVICE constexpr float factor(int band) { return 1.0f / float(1 << (band + 1) / 2); }

DEVICE constexpr int after(int slot) { return slot + 1 < SLOTS ? slot + 1 : 0; }

DEVICE constexpr int before(int slot) { return slot > 0 ? slot - 1 : SLOTS - 1; }

DEVICE constexpr int groups_of(int channels) { return (channels + WARP - 1) / WARP; }

// A part of a signal: blocks from `begin` to `end`, of which a segment has `span` at most.
struct Segment {
  Offset signal;
  int begin, end;
};

DEVICE constexpr int segments_of(int length, int span) {
  return (length + BLOCK * span - 1) / (BLOCK * span);
}

DEVICE Segment segment_at(int segment, int length, int span) {
  const int segments = segments_of(length, span), begin = segment % segments * span;
  return {segment / segments, begin, min((length + BLOCK - 1) / BLOCK, begin + span)};
}

// A block's samples (level 0) or coefficients, with R beside it before and behind.
struct Window {
  float low[LEVELS + 1][BLOCK + 2 * R], high[LEVELS + 1][BLOCK / 2 + 2 * R];
};

// A signal's channels of a warp.
struct Signal {
  const Scalar* from;
  int length, channels;  // Channels from here on.
  Offset row;            // Elements from a sample to the next, or from a channel.
};

DEVICE Signal signal_of(const Scalar* all, Offset signal, int first, int length, int channels) {
  const Offset place = CHANNELS_LAST ? first : Offset(first) * length;
  return {all + signal * length * channels + place, length, channels - first,
          CHANNELS_LAST ? channels : length};
}

// The piece of a block that a thread copies: its row, and its place across.
struct Place {
  int row, across;
  bool inside;
  Offset at;  // In memory, from the signal's first channel.
};

DEVICE Place place_of(int piece, const Signal& signal, int block) {
  const int row = threadIdx.x / ACROSS + piece * VECTOR, across = threadIdx.x % ACROSS * VECTOR;
  const int first = BLOCK * block;
#if CHANNELS_LAST
  const int sample = first + row, channel = across;
  const Offset at = sample * signal.row + channel;
#else
  const int sample = first + across, channel = row;
  const Offset at = channel * signal.row + sample;
#endif
  return {row, across, unsigned(sample) < unsigned(signal.length) && channel < signal.channels, at};
}

// Starts to copy a block to shared memory, zeros outside of the signal.
DEVICE void load(Scalar* to, const Signal& signal, int block) {
#pragma unroll UNROLLED
  for (int i = 0; i < ACROSS; i++) {
    const Place place = place_of(i, signal, block);
    const Scalar* from = place.inside ? signal.from + place.at : signal.from;
    Scalar* there = to + place.row * PITCH + place.across;
    constexpr int BYTES = VECTOR * sizeof(Scalar);
    if constexpr (BYTES < 4) {
      *there = place.inside ? *from : Scalar(0);
    } else {
      copy<BYTES>(there, from, place.inside);
    }
  }
}

// Stores a block's results, of which those of other lanes are in shared memory too.
DEVICE void store(const Scalar* from, const Signal& signal, int block, Scalar* to) {
#pragma unroll UNROLLED
  for (int i = 0; i < ACROSS; i++) {
    const Place place = place_of(i, signal, block);
    if (place.inside)
      *reinterpret_cast<Piece<VECTOR>*>(to + place.at) =
          *reinterpret_cast<const Piece<VECTOR>*>(from + place.row * PITCH + place.across);
  }
}

// The first samples of a block of this thread's channel.
template <int COUNT>
DEVICE void samples_of(const Scalar* slot, float* to) {
#if CHANNELS_LAST
#pragma unroll
  for (int i = 0; i < COUNT; i++) to[i] = number(slot[i * PITCH + threadIdx.x]);
#else
#pragma unroll
  for (int first = 0; first < COUNT; first += SIXTEEN) {
    const auto piece =
        *reinterpret_cast<const Piece<SIXTEEN>*>(slot + threadIdx.x * PITCH + first);
#pragma unroll
    for (int i = 0; i < SIXTEEN; i++)
      if (first + i < COUNT) to[first + i] = number(piece.at[i]);
  }
#endif
}

// The other way round, a whole block.
DEVICE void put_samples(const float (&from)[BLOCK], Scalar* slot) {
#if CHANNELS_LAST
#pragma unroll
  for (int i = 0; i < BLOCK; i++) slot[i * PITCH + threadIdx.x] = scalar(from[i]);
#else
#pragma unroll
  for (int first = 0; first < BLOCK; first += SIXTEEN) {
    Piece<SIXTEEN> piece;
#pragma unroll
    for (int i = 0; i < SIXTEEN; i++) piece.at[i] = scalar(from[first + i]);
    *reinterpret_cast<Piece<SIXTEEN>*>(slot + threadIdx.x * PITCH + first) = piece;
  }
#endif
}

// Starts to copy the first block of a segment, and those around it.
DEVICE void load_first(Scalar* slots, const Signal& signal, const Segment& part) {
#pragma unroll 1
  for (int i = 0; i <= AROUND; i++) load(slots + i * SLOT, signal, part.begin - AROUND + i);
}

// The coefficients of a level and those below it, from the low band of the level above.
template <int LEVEL>
DEVICE void analyse(Window& window) {
  if constexpr (LEVEL <= LEVELS) {
#pragma unroll
    for (int i = 0; i < count_at(LEVEL); i++) {
      const float one = window.low[LEVEL - 1][R + 2 * i], other = window.low[LEVEL - 1][R + 2 * i + 1];
      window.low[LEVEL][R + i] = one + other;
      window.high[LEVEL][R + i] = one - other;
    }
    analyse<LEVEL + 1>(window);
  }
}

// A block of each level, from its samples in shared memory.
DEVICE void read(const Scalar* slot, Window& window) {
  samples_of<BLOCK>(slot, window.low[0] + R);
  analyse<1>(window);
}

// What follows the block on each level, of COUNT numbers of the level above.
template <int LEVEL, int COUNT>
DEVICE void behind(const float (&numbers)[COUNT], Window& window) {
#pragma unroll
  for (int i = 0; i < R; i++) window.low[LEVEL][R + count_at(LEVEL) + i] = numbers[i];
  if constexpr (LEVEL < LEVELS) {
    float half[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
      half[i] = numbers[2 * i] + numbers[2 * i + 1];
      if (i < R)
        window.high[LEVEL + 1][R + count_at(LEVEL + 1) + i] = numbers[2 * i] - numbers[2 * i + 1];
    }
    behind<LEVEL + 1>(half, window);
  }
}

// The same from the samples that follow it, in the slots after that of the block.
DEVICE void read_behind(const Scalar* slots, int slot, Window& window) {
#if KERNEL_SIZE > 1
  constexpr int LAST = AHEAD - BLOCK * (AROUND - 1);
  float numbers[AHEAD];
#pragma unroll
  for (int next = 0; next < AROUND - 1; next++) {
    slot = after(slot);
    samples_of<BLOCK>(slots + slot * SLOT, numbers + BLOCK * next);
  }
  samples_of<LAST>(slots + after(slot) * SLOT, numbers + AHEAD - LAST);
  behind<0>(numbers, window);
#endif
}

// Keeps the end of a block, which comes before the next one.
template <int LEVEL>
DEVICE void advance(Window& window) {
  if constexpr (LEVEL <= LEVELS) {
#pragma unroll
    for (int i = 0; i < R; i++) {
      window.low[LEVEL][i] = window.low[LEVEL][count_at(LEVEL) + i];
      if (LEVEL > 0) window.high[LEVEL][i] = window.high[LEVEL][count_at(LEVEL) + i];
    }
    advance<LEVEL + 1>(window);
  }
}

#ifdef FORWARD

struct Taps {
  float at[BANDS][K];
};

template <int COUNT>
DEVICE void fill(float (&numbers)[COUNT], float value) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) numbers[i] = value;
}

// What a level and those below it add to the low band above it, and the bias.
template <int LEVEL>
DEVICE void convolve(const Window& window, const Taps& taps, float bias,
                     float (&sums)[2 * count_at(LEVEL)]) {
  float below[count_at(LEVEL)];
  if constexpr (LEVEL < LEVELS) {
    convolve<LEVEL + 1>(window, taps, bias, below);
  } else {
    fill(below, bias);
  }
#pragma unroll
  for (int i = 0; i < count_at(LEVEL); i++) {
    float low = below[i], high = 0.0f;
#pragma unroll
    for (int e = 0; e < K; e++) {
      low += window.low[LEVEL][i + e] * taps.at[2 * LEVEL - 1][e];
      high += window.high[LEVEL][i + e] * taps.at[2 * LEVEL][e];
    }
    sums[2 * i] = low + high;
    sums[2 * i + 1] = low - high;
  }
}

// `taps [K, BANDS, C]`. A segment is `span` blocks.
extern "C" __global__ void __launch_bounds__(WARP, RESIDENT)
line_forward(const Scalar* __restrict__ x, const float* __restrict__ taps,
             const float* __restrict__ bias, int length, int channels, int span,
             Scalar* __restrict__ y) {
  SHARED(shared);
  Scalar* slots = reinterpret_cast<Scalar*>(shared);
  const int groups = groups_of(channels), first = blockIdx.x % groups * WARP;
  const Segment part = segment_at(blockIdx.x / groups, length, span);
  const Signal signal = signal_of(x, part.signal, first, length, channels);
  const int channel = threadIdx.x;
  const bool there = channel < signal.channels;

  Taps own;
#pragma unroll
  for (int band = 0; band < BANDS; band++) {
#pragma unroll
    for (int e = 0; e < K; e++) {
      const float tap = there ? taps[(e * BANDS + band) * channels + first + channel] : 0.0f;
      own.at[band][e] = tap * factor(band);
    }
  }
  const float offset = there && bias ? bias[first + channel] : 0.0f;

  Window window = {};
  int slot = 0;
  load_first(slots, signal, part);
  commit();
#pragma unroll 1
  for (int block = part.begin - AROUND; block < part.end; block++) {
    wait<0>();
    // All have left the block before, whose slot is the next one's.
    __syncwarp();
    if (block + 1 < part.end) load(slots + before(slot) * SLOT, signal, block + AROUND + 1);
    commit();
    Scalar* samples = slots + slot * SLOT;
    read(samples, window);
    if (block >= part.begin) {
      read_behind(slots, slot, window);
      float sums[BLOCK];
      if constexpr (LEVELS > 0) {
        convolve<1>(window, own, offset, sums);
      } else {
        fill(sums, offset);
      }
      // Results take the places of their samples.
#pragma unroll
      for (int i = 0; i < BLOCK; i++) {
#pragma unroll
        for (int e = 0; e < K; e++) sums[i] += window.low[0][i + e] * own.at[0][e];
      }
      put_samples(sums, samples);
      __syncwarp();
      store(samples, signal, block, y + (signal.from - x));
    }
    advance<0>(window);
    slot = after(slot);
  }
}

#else

constexpr int SUMS = BANDS * K + 1;  // The taps', as `taps` has them, and that of the bias.

struct Sums {
  float at[BANDS][K], bias;
};

template <int COUNT>
DEVICE float total(const float (&numbers)[COUNT]) {
  float sum = numbers[0];
#pragma unroll
  for (int i = 1; i < COUNT; i++) sum += numbers[i];
  return sum;
}

// Adds the products of a block, summed apart: a sum of all of a long signal's would lose digits.
template <int WHOLE, int COUNT>
DEVICE void accumulate(const float (&window)[WHOLE], const float (&numbers)[COUNT],
                       float (&sums)[K]) {
#pragma unroll
  for (int e = 0; e < K; e++) {
    float sum = window[e] * numbers[0];
#pragma unroll
    for (int i = 1; i < COUNT; i++) sum += window[i + e] * numbers[i];
    sums[e] += sum;
  }
}

// Adds the products of a level and those below it, of dy's low band of the level above.
template <int LEVEL>
DEVICE void correlate(const Window& window, const float (&numbers)[2 * count_at(LEVEL)],
                      Sums& sums) {
  float low[count_at(LEVEL)], high[count_at(LEVEL)];
#pragma unroll
  for (int i = 0; i < count_at(LEVEL); i++) {
    low[i] = numbers[2 * i] + numbers[2 * i + 1];
    high[i] = numbers[2 * i] - numbers[2 * i + 1];
  }
  accumulate(window.low[LEVEL], low, sums.at[2 * LEVEL - 1]);
  accumulate(window.high[LEVEL], high, sums.at[2 * LEVEL]);
  if constexpr (LEVEL < LEVELS) {
    correlate<LEVEL + 1>(window, low, sums);
  } else {
    sums.bias += total(low);  // Low bands are sums.
  }
}

// `sums [programs, SUMS, C]` holds each program's share, of each `programs`-th of the segments.
extern "C" __global__ void __launch_bounds__(WARP, RESIDENT)
line_weights(const Scalar* __restrict__ x, const Scalar* __restrict__ dy, int signals, int length,
             int channels, int span, int programs, float* __restrict__ sums) {
  SHARED(shared);
  Scalar* slots = reinterpret_cast<Scalar*>(shared);
  Scalar* others = slots + SLOTS * SLOT;
  const int groups = groups_of(channels), first = blockIdx.x % groups * WARP;
  const int program = blockIdx.x / groups, channel = threadIdx.x;
  const int segments = signals * segments_of(length, span);

  Sums found = {};
#pragma unroll 1
  for (int segment = program; segment < segments; segment += programs) {
    const Segment part = segment_at(segment, length, span);
    const Signal signal = signal_of(x, part.signal, first, length, channels);
    const Signal other = signal_of(dy, part.signal, first, length, channels);
    Window window = {};
    int slot = 0;
    // The last blocks of another segment have been read.
    __syncwarp();
    load_first(slots, signal, part);
    load(others + part.begin % 2 * SLOT, other, part.begin);
    commit();
#pragma unroll 1
    for (int block = part.begin - AROUND; block < part.end; block++) {
      wait<0>();
      __syncwarp();
      if (block + 1 < part.end) load(slots + before(slot) * SLOT, signal, block + AROUND + 1);
      if (block >= part.begin && block + 1 < part.end)
        load(others + (block + 1) % 2 * SLOT, other, block + 1);
      commit();
      read(slots + slot * SLOT, window);
      if (block >= part.begin) {
        read_behind(slots, slot, window);
        float numbers[BLOCK];
        samples_of<BLOCK>(others + block % 2 * SLOT, numbers);
        accumulate(window.low[0], numbers, found.at[0]);
        if constexpr (LEVELS > 0) {
          correlate<1>(window, numbers, found);
        } else {
          found.bias += total(numbers);
        }
      }
      advance<0>(window);
      slot = after(slot);
    }
  }

  if (first + channel >= channels) return;
  float* to = sums + Offset(program) * SUMS * channels + first + channel;
#pragma unroll
  for (int e = 0; e < K; e++) {
#pragma unroll
    for (int band = 0; band < BANDS; band++)
      to[Offset(e * BANDS + band) * channels] = found.at[band][e] * factor(band);
  }
  to[Offset(SUMS - 1) * channels] = found.bias;
}

#endif
