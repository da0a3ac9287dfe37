// Copies of pieces from memory to shared memory, for NVRTC and for the emulation on a CPU: in groups
// that a thread waits for, before compute capability 8.0 at once.

#define DEVICE __device__ __forceinline__

typedef long long Offset;

struct alignas(8) Four {
  unsigned low, high;  // Channels 0 and 1, 2 and 3.
};

struct alignas(16) Eight {
  Four low, high;
};

#ifdef __CUDACC__

DEVICE unsigned address(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

// Starts to copy 4, 8 or 16 bytes to shared memory, zeros where they are outside of the image.
template <int BYTES>
DEVICE void copy(void* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address(to)), "l"(from),
                 "n"(BYTES == 16 ? 8 : BYTES), "r"(inside ? BYTES : 0)
                 : "memory");
  }
#else
  if (BYTES == 16) {
    *static_cast<Eight*>(to) = inside ? *static_cast<const Eight*>(from) : Eight{};
  } else if (BYTES == 8) {
    *static_cast<Four*>(to) = inside ? *static_cast<const Four*>(from) : Four{};
  } else {
    *static_cast<unsigned*>(to) = inside ? *static_cast<const unsigned*>(from) : 0;
  }
#endif
}

// Ends a group of this thread's copies.
DEVICE void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread's copies but the last PENDING.
template <int PENDING>
DEVICE void wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

#else

template <int BYTES>
DEVICE void copy(void* to, const void* from, bool inside) {
  cuda_on_cpu::copy(to, from, BYTES, inside);
}
DEVICE void commit() { cuda_on_cpu::commit(); }
template <int PENDING>
DEVICE void wait() {
  cuda_on_cpu::wait(PENDING);
}

#endif
