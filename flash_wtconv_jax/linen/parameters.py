"""Parameters of linen layers, at the cost of a look-up."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flash_wtconv_jax.functional.wtconv import Parameter


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """A parameter of a layer, the same that `module.param` returns.

    `module.param` traces the initialiser at every call, to compare its shape with that of the
    parameter: milliseconds of an eager call. Here the shape is known.

    Args:
        module: The layer, in a method that may make parameters.
        name: The parameter's name.
        init: Its initialiser, called when the layer is initialised.
        shape: Its shape.
        dtype: The dtype that it is made with.

    Returns:
        The parameter, without the box of its metadata.

    Raises:
        flax.errors.ScopeParamShapeError: The parameter has another shape.
        flax.errors.ScopeParamNotFoundError: The variables do not hold it.
    """
    if module.has_variable("params", name):
        value = nn.unbox(module.get_variable("params", name))
        if jnp.shape(value) == shape:
            return value
    return module.param(name, init, shape, dtype)


def parameters(module: nn.Module, table: Mapping[str, Parameter]) -> dict[str, jax.Array]:
    """The parameters of a table by name, see `parameter`; of the layer's `param_dtype`."""
    return {
        name: parameter(module, name, entry.init, entry.shape, module.param_dtype)
        for name, entry in table.items()
    }
