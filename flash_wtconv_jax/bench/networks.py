"""Networks to be timed, with parameters of no meaning."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def drawn(make: Callable[[], Model]) -> Model:
    """A network whose parameters NumPy draws: vectors as they come, others by their fan-in.

    The initial values of a network's layers are one program of JAX, with a kernel a parameter,
    which compiles for longer than the network does.

    Args:
        make: Makes the network, which has no other state than parameters.

    Example:
        >>> drawn(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))).kernel.shape
        (2, 3)
    """
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values / math.sqrt(math.prod(leaf.shape[:-1])), leaf.dtype)

    model = nnx.eval_shape(make)
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model
