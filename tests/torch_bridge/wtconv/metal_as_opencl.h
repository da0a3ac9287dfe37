// What `wtconv.metal` uses of the Metal language, for clang's C++ for OpenCL: it has the same address
// spaces, and checks them.

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
// It has no bfloat16; another type of two bytes has the same address spaces.
#define bfloat half
#define threadgroup __local
#define int2(...) ((int2)(__VA_ARGS__))
#define float4(...) ((float4)(__VA_ARGS__))

namespace metal {
enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { barrier(CLK_LOCAL_MEM_FENCE); }
}  // namespace metal
