"""Compiles the norm's Mosaic GPU kernels for an H200, without one, and prints what each takes.

`python -m helpers.mosaic_gpu_compiled FOLDER`, a process of its own: Mosaic writes what its
compilers say into the folder, where the environment names it before JAX is imported. It needs
jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version (JAX 0.11 has it; 400 MB, which no extra
brings), and `ptxas`. Printed are registers of a thread, bytes that do not fit in them, and bytes of
shared memory of a block, as JSON.
"""

import json
import os
import re
import sys
from pathlib import Path

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""

# Shape, dtype, direction and sizes: clusters, all blocks, images of odd sizes, larger than memory.
LAUNCHES = (
    ((8, 128, 128, 128), "bfloat16", "fwd", dict(channels=32, members=8, pixels=128)),
    ((8, 128, 128, 128), "bfloat16", "fwd", {}),
    ((8, 256, 256, 64), "float32", "bwd", {}),
    ((1, 270, 479, 128), "float16", "fwd", {}),
    ((1, 1024, 1024, 32), "float32", "fwd", {}),
)


def taken(folder):
    """The compilers' report of the kernel whose files are in a folder, which are removed."""
    texts = {file.suffix: file.read_text() for file in folder.iterdir() if file.suffix != ".log"}
    for file in folder.iterdir():
        file.unlink()
    report, resources = texts[".ptxas"], texts[".txt"]
    spilled = re.findall(r"(\d+) bytes spill", report)
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources)[1]
    return [int(re.search(r"Used (\d+) registers", report)[1]), sum(map(int, spilled)), int(shared)]


def main(folder):
    import jax
    from jax._src import xla_bridge
    from jax.experimental import topologies

    from pallas_kernels.stylize import mosaic_gpu

    xla_bridge.discover_pjrt_plugins()
    rest = {"target_config": H200, "topology": "1x1x1"}
    topology = topologies.get_topology_desc("1x1x1", "cuda", **rest)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    found = {}
    for shape, dtype, direction, sizes in LAUNCHES:
        n, *_, c = shape
        x, each, known = (
            jax.ShapeDtypeStruct(size, kind, sharding=sharding)
            for size, kind in ((shape, dtype), ((n, c), "float32"), ((n, 3, c), "float32"))
        )
        if direction == "fwd":
            run = mosaic_gpu.forward.trace(
                x, each, each, None, eps=1e-5, activation="relu", **sizes
            )
        else:
            run = mosaic_gpu.backward.trace(x, known, each, each, x, x, activation="relu", **sizes)
        run.lower(lowering_platforms=("cuda",)).compile()
        found[f"{shape} {dtype} {direction} {sizes}"] = taken(folder)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    os.environ |= {"MOSAIC_GPU_DUMP_TO": sys.argv[1], "MOSAIC_GPU_DUMP_PTXAS": "1"}
    main(Path(sys.argv[1]))
