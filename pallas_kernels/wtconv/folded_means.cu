// The means of the squares of two rows and columns of 16-bit images [N, H, W, C], for NVRTC.
//
// The host defines BFLOAT16, 1 or 0 for float16, and the macros of `folded_means.cuh`.

#include "../common/tensor_cores.cuh"
#include "folded_means.cuh"

// A thread makes VECTOR channels of a pixel, whose number is one of 32 bits: division of 64 takes
// longer than all else.
extern "C" __global__ void __launch_bounds__(256)
folded_means(const Scalar* __restrict__ x, int count, int channels, int height, int width,
             Scalar* __restrict__ y) {
  const unsigned parts = channels / VECTOR, across = (width + 1) / 2, down = (height + 1) / 2;
  const unsigned at = blockIdx.x * 256u + threadIdx.x;
  const unsigned pixel = at / parts, line = pixel / across;
  const int channel = int(at - pixel * parts) * VECTOR, column = int(pixel - line * across);
  const int row = int(line % down), image = int(line / down);
  if (image >= count) return;
  reinterpret_cast<Piece*>(y)[at] = means_at(x + Offset(image) * height * width * channels + channel,
                                             row, column, height, width, channels);
}
