// The means of the squares of two rows and columns of float32 images [N, H, W, C], and of the squares
// of these, for NVRTC.
//
// The host defines this macro:
//   TWICE            whether the means of the squares of the means are made too

typedef long long Offset;

__device__ __forceinline__ float mean(const float (&pixels)[4]) {
  return 0.25f * ((pixels[0] + pixels[1]) + (pixels[2] + pixels[3]));
}

// A thread makes SIDE x SIDE means of a channel, whose number is one of 32 bits: division of 64 takes
// longer than all else. Images are small: more channels a thread would be too few threads.
extern "C" __global__ void __launch_bounds__(256)
bands_means(const float* __restrict__ x, int count, int channels, int height, int width,
            float* __restrict__ y
#if TWICE
            ,
            float* __restrict__ of_means
#endif
) {
  constexpr int SIDE = 1 + TWICE, PIXELS = 2 * SIDE;
  const int across = (width + 1) / 2, down = (height + 1) / 2;
  const unsigned sides = (across + SIDE - 1) / SIDE, lines = (down + SIDE - 1) / SIDE;
  const unsigned at = blockIdx.x * 256u + threadIdx.x, place = at / channels, line = place / sides;
  const int channel = int(at - place * channels), side = int(place - line * sides);
  const int image = int(line / lines), top = int(line % lines);
  if (image >= count) return;
  const float* from = x + Offset(image) * height * width * channels + channel;
  // Pixels outside are read from where the image ends, so that no load waits for a branch: all are on
  // their way at once.
  float pixels[PIXELS][PIXELS];
#pragma unroll
  for (int i = 0; i < PIXELS; i++) {
    const int row = min(PIXELS * top + i, height - 1);
#pragma unroll
    for (int j = 0; j < PIXELS; j++) {
      const int column = min(PIXELS * side + j, width - 1);
      pixels[i][j] = from[Offset(row * width + column) * channels];
    }
  }
  float means[SIDE][SIDE];
#pragma unroll
  for (int i = 0; i < SIDE; i++) {
#pragma unroll
    for (int j = 0; j < SIDE; j++) {
      float square[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int row = 2 * i + k / 2, column = 2 * j + k % 2;
        const bool there = PIXELS * top + row < height && PIXELS * side + column < width;
        square[k] = there ? pixels[row][column] : 0.0f;
      }
      means[i][j] = mean(square);
    }
  }
  float* to = y + Offset(image) * down * across * channels + channel;
#pragma unroll
  for (int i = 0; i < SIDE; i++) {
#pragma unroll
    for (int j = 0; j < SIDE; j++) {
      const int row = SIDE * top + i, column = SIDE * side + j;
      if (row < down && column < across)
        to[Offset(row * across + column) * channels] = means[i][j];
    }
  }
#if TWICE
  const float square[] = {means[0][0], means[0][1], means[1][0], means[1][1]};
  of_means[((Offset(image) * lines + top) * sides + side) * channels + channel] = mean(square);
#endif
}
