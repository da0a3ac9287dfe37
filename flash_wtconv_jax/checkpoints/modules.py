"""Moves variables into nnx models and out of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from flash_wtconv_jax.checkpoints.names import flatten
from flash_wtconv_jax.checkpoints.tensors import check_nested
from pallas_kernels.common.types import Tree

if TYPE_CHECKING:
    from flax import nnx


def variables_of(model: "nnx.Module") -> dict[str, Tree]:
    """The parameters of an nnx model as variables, for `to_torch` or `save`.

    Args:
        model: An nnx module with parameters anywhere inside.

    Returns:
        `{"params": nested dict}` of NumPy arrays; the places of a list are named "0", "1", ….

    Raises:
        TypeError: The model is no nnx module.

    Example:
        >>> from flax import nnx
        >>> variables_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))["params"]["bias"].shape
        (3,)
    """
    from flax import nnx

    _check_module(model, "holds no variables: init(key, x) returns them")
    return {"params": _with_text_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))}


def load_into(model: "nnx.Module", variables: Mapping[str, Tree]) -> None:
    """Replaces the parameters of an nnx model by variables, all of them or none.

    Args:
        model: An nnx module, or its shapes alone from `nnx.eval_shape`.
        variables: `{"params": ...}` of `from_torch`, `restore` or `variables_of`, or the nested
            dict alone. Arrays are cast to the dtypes of the model's parameters.

    Raises:
        TypeError: The model is no nnx module.
        ValueError: Names or shapes differ; every one is in the message.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> load_into(model, {"params": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}})
        >>> float(model(np.ones(2, np.float32))[0])
        2.0
    """
    import jax.numpy as jnp
    from flax import nnx

    _check_module(model, "takes variables in apply(variables, x)")
    arrays = flatten(variables)
    state = nnx.state(model, nnx.Param)
    leaves = nnx.to_flat_state(state)
    names = {".".join(map(str, path)): leaf for path, leaf in leaves}
    problems = [f"missing: {n} {leaf.shape}" for n, leaf in names.items() if n not in arrays]
    problems += [f"surplus: {n} {array.shape}" for n, array in arrays.items() if n not in names]
    problems += [
        f"misshapen: {name} is {arrays[name].shape}, expected {leaf.shape}"
        for name, leaf in names.items()
        if name in arrays and arrays[name].shape != leaf.shape
    ]
    if problems:
        count = f"variables do not fit {type(model).__name__}: {len(problems)} names differ"
        raise ValueError("\n  ".join([count, *problems]))
    loaded = {
        path: leaf.replace(jnp.asarray(arrays[".".join(map(str, path))], leaf.dtype))
        for path, leaf in leaves
    }
    nnx.update(model, nnx.from_flat_state(loaded))


def for_bridge(variables: Mapping[str, Tree]) -> dict[str | int, Tree]:
    """The same variables for an nnx model in linen, `nnx.bridge.to_linen`.

    Args:
        variables: Nested dict as `from_torch`, `restore` and `variables_of` return it.

    Returns:
        The nested dict with the places of lists as integers, which the bridge expects.

    Raises:
        TypeError: The variables are no nested dict, but a model.

    Example:
        >>> for_bridge({"params": {"stages": {"0": {"gamma": 1}}}})
        {'params': {'stages': {0: {'gamma': 1}}}}
    """
    check_nested(variables)
    return {
        int(key) if key.isdigit() else key: for_bridge(value)
        if isinstance(value, Mapping)
        else value
        for key, value in variables.items()
    }


def _check_module(model: object, linen: str) -> None:
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected an nnx module; a linen module {linen}"
        )


def _with_text_keys(tree: Tree) -> Tree:
    if isinstance(tree, Mapping):
        return {str(key): _with_text_keys(value) for key, value in tree.items()}
    return np.asarray(tree)
