// The means of the squares of two rows and columns of 16-bit images [N, H, W, C], for NVRTC.
//
// The host defines these macros, beside those of `folded_means.cuh`:
//   BFLOAT16         1, or 0 for float16
//   TWICE            whether the means of the squares of the means are made too
//   JOINED           whether they are made of two arrays, those of `dy` behind those of x in each pixel:
//                    one array, for which XLA finds room in that of dx or y, where it would not for two

#include "../common/tensor_cores.cuh"
#include "folded_means.cuh"

// A thread makes VECTOR channels of two columns, TWICE, or one, of a pair of rows, whose number is
// one of 32 bits: division of 64 takes longer than all else.
extern "C" __global__ void __launch_bounds__(256)
folded_means(const Scalar* __restrict__ x,
#if JOINED
             const Scalar* __restrict__ dy,
#endif
             int count, int channels, int height, int width, Scalar* __restrict__ y
#if TWICE
             ,
             Scalar* __restrict__ of_means
#endif
) {
  constexpr int COLUMNS = 1 + TWICE;
  const unsigned parts = channels / VECTOR, across = (width + 1) / 2, down = (height + 1) / 2;
  // From the last image to the first, as what made x has left its end in L2.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const unsigned at = block * 256u + threadIdx.x, pairs = (down + 1) / 2;
  const unsigned sides = (across + COLUMNS - 1) / COLUMNS;
  const unsigned pixel = at / parts, line = pixel / sides;
  const int channel = int(at - pixel * parts) * VECTOR, side = int(pixel - line * sides);
  const int pair = int(line % pairs);
  int image = int(line / pairs), first = 0;
#if JOINED
  if (image >= count) {
    image -= count;
    first = channels;
    x = dy;
  }
#endif
  if (image >= count) return;
  const int row = 2 * pair, column = COLUMNS * side, stride = JOINED ? 2 * channels : channels;
  const Scalar* from = x + Offset(image) * height * width * channels + channel;
  const Square upper(from, row, column, height, width, channels);
  const Square lower(from, row + 1, column, height, width, channels);
#if TWICE
  const Square upper_right(from, row, column + 1, height, width, channels);
  const Square lower_right(from, row + 1, column + 1, height, width, channels);
#endif
  Scalar* to = y + ((Offset(image) * down + row) * across + column) * stride + first + channel;
  // Below the last pixel is none: then the upper one is written over the lower one, and so right of
  // it. A branch would take the loads of the lower one with it, behind those of the upper one.
  const Offset next = row + 1 < int(down) ? Offset(across) * stride : 0;
  const Piece above = upper.means(), below = lower.means();
#if TWICE
  const int right = column + 1 < int(across) ? stride : 0;
  const Piece above_right = upper_right.means(), below_right = lower_right.means();
  *reinterpret_cast<Piece*>(to + next + right) = below_right;
  *reinterpret_cast<Piece*>(to + next) = below;
  *reinterpret_cast<Piece*>(to + right) = above_right;
  *reinterpret_cast<Piece*>(to) = above;
  to = of_means + ((Offset(image) * pairs + pair) * sides + side) * stride + first + channel;
  *reinterpret_cast<Piece*>(to) = Square(above, above_right, below, below_right).means();
#else
  *reinterpret_cast<Piece*>(to + next) = below;
  *reinterpret_cast<Piece*>(to) = above;
#endif
}
