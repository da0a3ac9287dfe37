// Means of the squares of two rows and columns, for NVRTC, after `../common/tensor_cores.cuh`.
//
// The host defines these macros:
//   VECTOR           channels that one access to memory takes, a divisor of C
//   PASSING          with VECTOR 4 or 8, whether the pixels leave L2 before others; else it may be missing

#if PASSING
#if VECTOR == 8
typedef uint4 Passing;
#else
typedef uint2 Passing;
#endif
#endif

struct alignas(2 * VECTOR) Piece {
  Scalar at[VECTOR];

  // Two channels of it, or one and zeros.
  DEVICE unsigned word(int channel) const {
    return at[channel] | (channel + 1 < VECTOR ? unsigned(at[channel + 1]) << 16 : 0);
  }
};

DEVICE float mean(Scalar a, Scalar b, Scalar c, Scalar d) {
  return 0.25f * ((number_of(a) + number_of(b)) + (number_of(c) + number_of(d)));
}

// VECTOR channels of the four pixels of a square, and zeros of those that are not in the image.
struct Square {
  Piece pixels[4];
  bool there[4];

  // Pixels that are at hand, zeros where they are not in the image.
  DEVICE Square(const Piece& a, const Piece& b, const Piece& c, const Piece& d)
      : pixels{a, b, c, d}, there{true, true, true, true} {}

  // Reads them. `image` is the first channel that they are of. Pixels outside are read from where
  // the image ends, so that no load waits for a branch: many are on their way at once.
  DEVICE Square(const Scalar* __restrict__ image, int row, int column, int height, int width,
                int channels) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int r = 2 * row + k / 2, c = 2 * column + k % 2;
      const int pixel = min(r, height - 1) * width + min(c, width - 1);
      const Scalar* from = image + Offset(pixel) * channels;
#if PASSING
      const Passing piece = __ldcs(reinterpret_cast<const Passing*>(from));
      memcpy(&pixels[k], &piece, sizeof(piece));
#else
      pixels[k] = *reinterpret_cast<const Piece*>(from);
#endif
      there[k] = r < height && c < width;
    }
  }

  DEVICE Piece means() const {
    Piece result;
#pragma unroll
    for (int i = 0; i < VECTOR; i += 2) {
      unsigned words[4];
#pragma unroll
      for (int k = 0; k < 4; k++) words[k] = there[k] ? pixels[k].word(i) : 0;
      const unsigned both =
          packed(mean(words[0], words[1], words[2], words[3]),
                 mean(words[0] >> 16, words[1] >> 16, words[2] >> 16, words[3] >> 16));
#pragma unroll
      for (int j = 0; j < 2 && i + j < VECTOR; j++) result.at[i + j] = Scalar(both >> 16 * j);
    }
    return result;
  }
};
