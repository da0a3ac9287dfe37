"""Moves variables into nnx models and out of them."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from flash_wtconv_jax.checkpoints.names import flatten
from flash_wtconv_jax.checkpoints.tensors import check_nested
from pallas_kernels.common.types import Tree

if TYPE_CHECKING:
    import jax
    from flax import nnx


def variables_of(model: "nnx.Module") -> dict[str, Tree]:
    """The parameters of an nnx model as variables, for `to_torch` or `save`.

    Args:
        model: An nnx module with parameters anywhere inside. Variables of types of your own, such
            as frozen weights, count as parameters.

    Returns:
        `{"params": nested dict}` of NumPy arrays, and "batch_stats" of a model that has running
        statistics; the places of a list are named "0", "1", …, and a tied parameter is there once,
        by its first name, as Flax has it.

    Raises:
        TypeError: The model is no nnx module.

    Example:
        >>> from flax import nnx
        >>> variables_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))["params"]["bias"].shape
        (3,)
    """
    from flax import nnx

    _check_module(model, "holds no variables: init(key, x) returns them")
    variables = {"params": _with_text_keys(nnx.to_pure_dict(_parameters(model)))}
    if stats := nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)):
        variables["batch_stats"] = _with_text_keys(stats)
    return variables


def load_into(model: "nnx.Module", variables: Mapping[str, Tree]) -> None:
    """Replaces the parameters of an nnx model by variables, all of them or none.

    Args:
        model: An nnx module, or its shapes alone from `nnx.eval_shape`.
        variables: `{"params": ...}` of `from_torch`, `restore` or `variables_of`, or the nested
            dict alone; without "batch_stats" running statistics stay. Arrays are cast to the dtypes
            of the model's parameters and placed as they are, with their `NamedSharding`; types,
            metadata and ties stay. A tied parameter may be named by any of its places, or by
            several.

    Raises:
        TypeError: The model is no nnx module.
        ValueError: Names or shapes differ, or arrays of one parameter; every one is in the message.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> load_into(model, {"params": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}})
        >>> float(model(np.ones(2, np.float32))[0])
        2.0
    """
    from flax import nnx

    _check_module(model, "takes variables in apply(variables, x)")
    check_nested(variables)
    leaves = [*nnx.to_flat_state(_parameters(model))]
    arrays = flatten({n: tree for n, tree in variables.items() if n != "batch_stats"})
    if "batch_stats" in variables:
        leaves += nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
        arrays |= flatten({"params": variables["batch_stats"]})
    names = {_joined(path): leaf for path, leaf in leaves}
    arrays, problems = _untied(arrays, _ties(model), names)
    problems += [f"missing: {n} {leaf.shape}" for n, leaf in names.items() if n not in arrays]
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
        path: leaf.replace(placed_like(arrays[_joined(path)], leaf.get_value()))
        for path, leaf in leaves
    }
    nnx.update(model, nnx.from_flat_state(loaded))


def _parameters(model: "nnx.Module") -> "nnx.State":
    """The parameters of a model, those that its user froze by a type of their own too."""
    from flax import nnx

    others = (nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.OptState, nnx.Perturbation)
    return nnx.state(model, nnx.Not(nnx.Any(*others, nnx.RngState)))


def _joined(path: Iterable[object]) -> str:
    return ".".join(map(str, path))


def _ties(model: "nnx.Module") -> list[tuple[str, str]]:
    """The other names of whatever a model holds in several places, each with its first name."""
    from flax import nnx

    places = nnx.find_duplicates(model)
    ties = [(other, first) for first, *others in places for other in others]
    # A module's before those of what is inside, which has one more name through each of its names.
    ties.sort(key=lambda tie: len(tie[0]))
    return [(_joined(other), _joined(first)) for other, first in ties]


def _untied(
    arrays: dict[str, np.ndarray], ties: list[tuple[str, str]], names: Collection[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays by the first names of parameters, and the pairs of places that hold other values."""
    result: dict[str, np.ndarray] = {}
    problems = []
    for name, array in arrays.items():
        first = name
        for other, target in ties:
            if first not in names and f"{first}.".startswith(f"{other}."):
                first = target + first[len(other) :]
        if first in result and not np.array_equal(result[first], array, equal_nan=True):
            problems.append(f"differ: {name} and {first}, which are tied")
        result.setdefault(first, array)
    return result, problems


def placed_like(
    array: "np.ndarray | jax.Array", like: "jax.Array | jax.ShapeDtypeStruct"
) -> "jax.Array":
    """An array in the dtype and on the devices of another, or of what describes one.

    Args:
        array: An array of the same shape.
        like: Another; what JAX put on its default device goes wherever it is used, and so does the
            result then.
    """
    import jax

    place = None
    if isinstance(like, jax.ShapeDtypeStruct) or (
        isinstance(like, jax.Array) and not isinstance(like, jax.core.Tracer) and like.committed
    ):
        place = like.sharding
    if isinstance(place, jax.sharding.NamedSharding) and isinstance(
        place.mesh, jax.sharding.AbstractMesh
    ):
        place = place.spec  # Of the mesh that is set.
    return jax.device_put(array.astype(like.dtype), place)


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
