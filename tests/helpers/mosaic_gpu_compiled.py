"""Compiles operators' Mosaic GPU kernels for an H200, without one, and prints what each takes.

`python -m helpers.mosaic_gpu_compiled FOLDER OPERATOR`, a process of its own: Mosaic writes what
its compilers say into the folder, where the environment names it before JAX is imported. It needs
jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version (JAX 0.11 has it; 400 MB, which no extra
brings), and `ptxas`. Printed are registers of a thread, bytes that do not fit in them, and bytes of
shared memory of a block, as JSON. With `ahead` in the place of an operator it prints what `ahead`
returns.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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

# The norm's shape, dtype, direction and sizes: clusters, all blocks, images of odd sizes, larger
# than memory.
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


def stylize(sharding):
    """The traced launches of the norm, by name."""
    import jax

    from pallas_kernels.stylize import mosaic_gpu

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
        yield f"{shape} {dtype} {direction} {sizes}", run


def mlp(sharding):
    """The traced launches of whole MLPs, by name: of every width, every tile of the first."""
    import jax
    import numpy as np

    from pallas_kernels.mlp import mosaic_gpu_whole
    from pallas_kernels.mlp.problem import Problem

    for channels in (96, 128, 192):
        problem = Problem((100352, channels), np.dtype("float16"), 4 * channels, channels)
        x, first, second, inner, outer = (
            jax.ShapeDtypeStruct(size, problem.dtype, sharding=sharding)
            for size in (
                *(problem.shape, (channels, problem.hidden), (problem.hidden, channels)),
                *((problem.hidden,), (channels,)),
            )
        )
        for tile in mosaic_gpu_whole.TILES if channels == 96 else [None]:
            cut = mosaic_gpu_whole.tiling(problem, **(tile._asdict() if tile else {}))
            if cut is not None:
                given = x, (first, second), (inner, outer), x
                keys = {"epsilon": 1e-6, "cut": cut}
                yield f"{channels} {cut}", mosaic_gpu_whole.whole.trace(*given, **keys)


def ahead(folder, sharding, traced):
    """How often a kernel is compiled while its program is lowered, and how often later."""
    from pallas_kernels.common import device, mosaic_gpu_call

    def compiled():
        files = list(folder.iterdir())
        for file in files:
            # A second one would be written under the same name.
            file.unlink()
        return sum(file.suffix == ".ptxas" for file in files)

    (gpu,) = sharding.device_set
    device.current = lambda: gpu
    _, run = next(traced)
    program = run.lower(lowering_platforms=("cuda",))
    mosaic_gpu_call._COMPILERS.shutdown()
    by_thread = compiled()
    program.compile()
    return {"by the thread": by_thread, "again": compiled()}


def main(folder, operator):
    import jax
    from jax._src import xla_bridge
    from jax.experimental import topologies

    xla_bridge.discover_pjrt_plugins()
    rest = {"target_config": H200, "topology": "1x1x1"}
    topology = topologies.get_topology_desc("1x1x1", "cuda", **rest)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    if operator == "ahead":
        print(json.dumps(ahead(folder, sharding, mlp(sharding))))
        return
    found = {}
    for name, traced in {"stylize": stylize, "mlp": mlp}[operator](sharding):
        traced.lower(lowering_platforms=("cuda",)).compile()
        found[name] = taken(folder)
    json.dump(found, sys.stdout)


def report(operator, folder):
    """The registers and spills of each launch of an operator, by a process of its own."""
    pytest.importorskip("jax_cuda13_plugin", reason="jax-cuda13-plugin and jax-cuda13-pjrt")
    command = [sys.executable, "-m", "helpers.mosaic_gpu_compiled", str(folder), operator]
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], *filter(None, sys.path))))
    # There is no cuDNN, of which nothing is needed.
    rest = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    environment = os.environ | {"PYTHONPATH": paths} | rest
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


if __name__ == "__main__":
    os.environ |= {"MOSAIC_GPU_DUMP_TO": sys.argv[1], "MOSAIC_GPU_DUMP_PTXAS": "1"}
    main(Path(sys.argv[1]), sys.argv[2])
