"""Which device a call is traced for."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.common import device


def test_within_shard_map_it_is_a_real_device():
    """Abstract ones know no compute capability."""
    seen = []

    def shard(x):
        seen.append(device.current())
        return x

    cpu = jax.devices()[0]
    kind = AbstractDevice(cpu.device_kind, num_cores=None, platform=cpu.platform)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("batch")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind)):
        shard(None)
    jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(2))
    assert seen == [cpu, cpu]


def test_of_another_kind_it_is_the_meshs():
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        assert device.current() == chip
        assert (device.platform(), device.kind()) == ("tpu", "TPU v5 lite")
