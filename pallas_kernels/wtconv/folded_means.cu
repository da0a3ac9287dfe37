// The means of the squares of two rows and columns of 16-bit images [N, H, W, C], for NVRTC.
//
// The host defines BFLOAT16, 1 or 0 for float16, and the macros of `folded_means.cuh`.

#include "../common/tensor_cores.cuh"
#include "folded_means.cuh"

// A thread makes VECTOR channels of a pixel and of the one below, whose number is one of 32 bits:
// division of 64 takes longer than all else.
extern "C" __global__ void __launch_bounds__(256)
folded_means(const Scalar* __restrict__ x, int count, int channels, int height, int width,
             Scalar* __restrict__ y) {
  const unsigned parts = channels / VECTOR, across = (width + 1) / 2, down = (height + 1) / 2;
  const unsigned at = blockIdx.x * 256u + threadIdx.x, pairs = (down + 1) / 2;
  const unsigned pixel = at / parts, line = pixel / across;
  const int channel = int(at - pixel * parts) * VECTOR, column = int(pixel - line * across);
  const int row = 2 * int(line % pairs), image = int(line / pairs);
  if (image >= count) return;
  const Scalar* from = x + Offset(image) * height * width * channels + channel;
  const Square upper(from, row, column, height, width, channels);
  const Square lower(from, row + 1, column, height, width, channels);
  Scalar* to = y + ((Offset(image) * down + row) * across + column) * channels + channel;
  // Below the last pixel is none: then the upper one is written over the lower one. A branch would
  // take the loads of the lower one with it, behind those of the upper one.
  const Offset next = row + 1 < int(down) ? Offset(across) * channels : 0;
  *reinterpret_cast<Piece*>(to + next) = lower.means();
  *reinterpret_cast<Piece*>(to) = upper.means();
}
