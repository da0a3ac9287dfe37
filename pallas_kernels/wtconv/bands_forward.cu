// A level of the wavelet convolution in float32, for NVRTC; the host defines the macros of its files.

#include "bands_level.cuh"

// Thread blocks of a number are those of all chunks of 32 channels, and share the pairs of all tiles
// with the other `programs`; see `treat` for the other parameters.
extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, 1)
bands_forward(INPUT x,
#if BASE
              const float* __restrict__ bases,
#endif
              const float* __restrict__ bands,
#if BELOW
              INPUT below,
#endif
#if BELOW == 2
              INPUT deeper,
#endif
#if BASE
              const float* __restrict__ bias,
#endif
              int count, int channels, int high, int wide, int programs, int transpose,
              float* __restrict__ y
#if LOWS
              ,
              float* __restrict__ lows
#endif
#if LOWS == 2
              ,
              float* __restrict__ far_lows
#endif
) {
#if !BASE
  const float *bases = nullptr, *bias = nullptr;
#endif
#if BELOW < 2
  TREATED deeper = x;
#endif
#if !BELOW
  TREATED below = x;
#endif
#if LOWS < 2
  float* far_lows = nullptr;
#endif
#if !LOWS
  float* lows = nullptr;
#endif
  SHARED(shared);
  const int chunks = (channels + CHUNK - 1) / CHUNK;
  const Part part = {int(blockIdx.x) % chunks * CHUNK, int(blockIdx.x) / chunks, programs};
  treat(reinterpret_cast<unsigned char*>(shared), x, bases, bands, below, deeper, bias, count, channels,
        high, wide, part, transpose, y, lows, far_lows);
}
