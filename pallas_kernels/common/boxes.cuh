// Copies of boxes by TMA and barriers in shared memory, for NVRTC and for the emulation on a CPU. They
// are of compute capability 9.0 and newer.

#include "copies.cuh"

#ifndef SHARED
#define SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

typedef unsigned long long Barrier;

#ifdef __CUDACC__

// Numbers of an image's place: what the launcher encodes, and TMA reads.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

#define BOXES const __grid_constant__ TensorMap

#if __CUDA_ARCH__ >= 900

// A barrier in shared memory: a phase of it ends when so many threads have arrived at it, and all
// bytes that it expects. One thread makes those of a block, then calls `made`, then all meet.
DEVICE void make(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals)
               : "memory");
}

DEVICE void made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for bytes.
DEVICE void expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits for the end of the phase, 0 or 1 in turns.
DEVICE void wait_for(Barrier* barrier, unsigned phase) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again_%=:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again_%=;\n}" ::"r"(address(barrier)),
      "r"(phase)
      : "memory");
}

// Starts to copy a box from an array, zeros where it lies outside, and tells the barrier.
DEVICE void load_box(void* to, const TensorMap& map, Barrier* barrier, int channel, int column,
                     int row, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(address(to)),
      "l"(&map), "r"(address(barrier)), "r"(channel), "r"(column), "r"(row), "r"(image)
      : "memory");
}

// Starts to copy a box to an array, without what lies outside, as a group of this thread's.
DEVICE void store_box(const TensorMap& map, int channel, int column, int row, int image,
                      const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(address(from)), "r"(channel), "r"(column), "r"(row), "r"(image)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until shared memory may change that all of this thread's stores but the last PENDING read.
template <int PENDING>
DEVICE void stored() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Gives registers of each thread back, or takes such as others gave: all of four warps, which begin at
// a multiple of four.
template <int COUNT>
DEVICE void registers_less() {
  __syncwarp();
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void registers_more() {
  __syncwarp();
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Lets copies of boxes read what this thread has written to shared memory.
DEVICE void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif

#else

using cuda_on_cpu::TensorMap;
#define BOXES const TensorMap

DEVICE void make(Barrier* barrier, unsigned arrivals) { cuda_on_cpu::make(barrier, arrivals); }
DEVICE void made() {}
DEVICE void arrive(Barrier* barrier) { cuda_on_cpu::arrive(barrier); }
DEVICE void expect(Barrier* barrier, unsigned bytes) { cuda_on_cpu::expect(barrier, bytes); }
DEVICE void wait_for(Barrier* barrier, unsigned phase) { cuda_on_cpu::wait_for(barrier, phase); }
DEVICE void load_box(void* to, const TensorMap& map, Barrier* barrier, int channel, int column,
                     int row, int image) {
  cuda_on_cpu::load_box(to, map, barrier, {channel, column, row, image});
}
DEVICE void store_box(const TensorMap& map, int channel, int column, int row, int image,
                      const void* from) {
  cuda_on_cpu::store_box(map, {channel, column, row, image}, from);
}
template <int PENDING>
DEVICE void stored() {
  cuda_on_cpu::stored(PENDING);
}
DEVICE void publish() {}
template <int COUNT>
DEVICE void registers_less() {}
template <int COUNT>
DEVICE void registers_more() {}

#endif

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 900

// Makes the barriers of so many stages: one thread fills each, which so many arrivals empty.
template <int COUNT>
DEVICE void make_stages(Barrier* full, Barrier* empty, unsigned arrivals, unsigned thread) {
  if (threadIdx.x == thread) {
    for (int i = 0; i < COUNT; i++) {
      make(full + i, 1);
      make(empty + i, arrivals);
    }
    made();
  }
  __syncthreads();
}

#endif
