"""A function under `jax.shard_map`, on a mesh of one device."""

import jax
from jax.sharding import AxisType, PartitionSpec


def over_the_batch(function, batched, check_vma=True):
    """The function of arrays that `shard_map` splits along their batch, where `batched` says so.

    Args:
        function: Function of arrays, whose results are all batched.
        batched: Whether each argument is.
        check_vma: Whether JAX checks what varies over the mesh.
    """
    batch, whole = PartitionSpec("n"), PartitionSpec()
    return jax.shard_map(
        function,
        mesh=jax.make_mesh((1,), ("n",), axis_types=(AxisType.Auto,)),
        in_specs=tuple(batch if each else whole for each in batched),
        out_specs=batch,
        check_vma=check_vma,
    )
