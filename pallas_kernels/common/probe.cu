// A kernel by which `cuda_call` finds out whether what NVRTC writes is understood.

extern "C" __global__ void probe(const float* x, float* y) { *y = *x + 1.0f; }
