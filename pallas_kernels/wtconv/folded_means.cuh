// Means of the squares of two rows and columns, for NVRTC, after `../common/tensor_cores.cuh`.
//
// The host defines this macro:
//   VECTOR           channels that one access to memory takes, a divisor of C

struct alignas(2 * VECTOR) Piece {
  Scalar at[VECTOR];
};

DEVICE float mean(Scalar a, Scalar b, Scalar c, Scalar d) {
  return 0.25f * ((number_of(a) + number_of(b)) + (number_of(c) + number_of(d)));
}

// The means of VECTOR channels of a square, with zeros where the image has ended. `image` is the
// first channel that they are of.
DEVICE Piece means_at(const Scalar* __restrict__ image, int row, int column, int height, int width,
                      int channels) {
  Piece squares[4] = {}, result;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int r = 2 * row + k / 2, c = 2 * column + k % 2;
    if (r < height && c < width)
      squares[k] = *reinterpret_cast<const Piece*>(image + Offset(r * width + c) * channels);
  }
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) {
    float means[2] = {};
#pragma unroll
    for (int j = 0; j < 2 && i + j < VECTOR; j++)
      means[j] = mean(squares[0].at[i + j], squares[1].at[i + j], squares[2].at[i + j],
                      squares[3].at[i + j]);
    const unsigned both = packed(means[0], means[1]);
#pragma unroll
    for (int j = 0; j < 2 && i + j < VECTOR; j++) result.at[i + j] = Scalar(both >> 16 * j);
  }
  return result;
}
