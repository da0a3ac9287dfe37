"""Compiles what `flash-wtconv bench sharding` compares for two H200s, without one.

`python -m helpers.sharding_compiled OPERATOR...` prints for each program a line, as JSON: its
label, what it exchanges, its kernels, those of one GPU's program, and the numbers of an image. It
needs what `helpers.mosaic_gpu_compiled` needs, and NVRTC; operators whose kernels are Triton's need
jax-triton too. A process of its own, since it makes the package believe in a GPU.
"""

import json
import sys
from functools import partial

from helpers.mosaic_gpu_compiled import H200


def two_gpus():
    """The devices, which every choice between kernels is made for from here on."""
    from importlib.util import find_spec

    from jax._src import xla_bridge
    from jax.experimental import topologies

    from pallas_kernels.common import cuda_call, device

    xla_bridge.discover_pjrt_plugins()
    rest = {"target_config": H200, "topology": "1x1x2"}
    devices = [*topologies.get_topology_desc("1x1x2", "cuda", **rest).devices]
    device.current = lambda: devices[0]
    # Nothing can be launched.
    cuda_call._refusal_of_probe = lambda gpu: None
    if find_spec("jax_triton"):
        from jax_triton import triton_lib

        triton_lib.triton_kernel_call_lib.get_compute_capability = lambda _: 90
    return devices


def main(names):
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

    from flash_wtconv_jax.bench import sharding
    from flash_wtconv_jax.bench.collectives import collectives
    from flash_wtconv_jax.bench.sharding_cases import cases

    devices = two_gpus()

    def lying(arrays, place):
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place), arrays
        )

    def text(function, arrays, given):
        return jax.jit(partial(sharding._both, function)).lower(arrays, given).compile().as_text()

    def spread(case, split, kind):
        own = kind == sharding._OWN
        axes = (AxisType["Explicit" if own else kind],)
        mesh = Mesh(np.array(devices), (split,), axis_types=axes)

        def put(axes, array):
            return lying(array, NamedSharding(mesh, sharding._spec(axes, split)))

        pairs = zip(case.axes, case.arrays, strict=True)
        arrays = tuple(jax.tree.map(put, *pair) for pair in pairs)
        given = tuple(put("s", part) for part in case.given)
        function = sharding._own_shard_map(case, split, mesh) if own else case.function
        with jax.set_mesh(mesh):
            return text(function, arrays, given)

    for case in cases(False, 2):
        if case.name not in names:
            continue
        alone = lying((case.arrays, case.given), SingleDeviceSharding(devices[0]))
        one = sharding._kernels(text(case.function, *alone))
        image = max(leaf.size for leaf in jax.tree.leaves(case.arrays))
        for split in case.splits:
            for kind in (*sharding.KINDS, *((sharding._OWN,) if split in "ns" else ())):
                program = spread(case, split, kind)
                found = collectives(program), sharding._kernels(program), one, image
                print(json.dumps([f"{case.name} over {split}, {kind}", *found]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
