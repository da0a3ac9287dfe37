"""Parameters that an optimizer treats alike, as one vector.

A network has hundreds of parameters, AdamW and averages three more arrays for each. To hand them
from step to step takes Python and XLA milliseconds, and a GPU updates them by as many kernels.
Vectors take next to nothing of either; they are cut where the network needs its parameters.

On a CPU they save the compiler operations: AdamW of each parameter is three loops. There large
parameters stay by themselves, since their bytes are copied when they are joined and cut, but they
are vectors too: those of as many numbers share the loops. Cuts are kept apart from what reads them:
together they would be compiled once for each parameter, where those of a size share what is
compiled.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from pallas_kernels.common._compat import unfused
from pallas_kernels.common.border import border
from pallas_kernels.common.device import on_cpu

_Tree = TypeVar("_Tree")

_LARGE = 1 << 17
"""The fewest numbers of a parameter that a CPU keeps by itself."""


class Vectors:
    """Joins the parameters of each kind, and what an optimizer keeps of them.

    A kind's vector bears the name of its first parameter. A parameter that is alone in its kind
    keeps its shape; a large one is a vector of its own on a CPU.

    Args:
        params: The parameters; shapes are enough.
        kinds: The kind of each, in the order of `jax.tree.leaves`.

    Example:
        >>> params = nnx.State({"a": jnp.ones((2, 2)), "b": jnp.zeros(3), "c": jnp.ones(1)})
        >>> vectors = Vectors(params, ["kernel", "bias", "kernel"])
        >>> joined = vectors.joined(params)
        >>> jax.tree.map(jnp.shape, dict(joined))
        {'a': (5,), 'b': (3,)}
        >>> jax.tree.map(jnp.shape, dict(vectors.cut(joined)))
        {'a': (2, 2), 'b': (3,), 'c': (1,)}
    """

    def __init__(self, params: nnx.State, kinds: Sequence[Hashable]) -> None:
        leaves, self._structure = jax.tree.flatten(params)
        groups: dict[Hashable, list[int]] = {}
        least = _LARGE if on_cpu() else math.inf
        for index, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
            alone = index if math.prod(leaf.shape) >= least else None
            groups.setdefault((kind, jnp.dtype(leaf.dtype), alone), []).append(index)
        self._groups = list(groups.values())
        self._shapes = [leaf.shape for leaf in leaves]
        counts = Counter(kinds)
        self._joins = [counts[kinds[group[0]]] > 1 for group in self._groups]
        named = list(nnx.to_flat_state(params))
        firsts = nnx.from_flat_state([named[group[0]] for group in self._groups])
        self._structure_of_vectors = jax.tree.structure(firsts)

    def joined(self, tree: _Tree) -> _Tree:
        """The same tree with the vectors of each `nnx.State` in it in place of its parameters."""

        def join(leaves: list[Any]) -> list[Any]:
            return [
                _vector([leaves[index] for index in group]) if joins else leaves[group[0]]
                for group, joins in zip(self._groups, self._joins, strict=True)
            ]

        return _mapped(tree, join, self._structure_of_vectors)

    def cut(self, tree: _Tree) -> _Tree:
        """The same tree with parameters in place of vectors."""

        def cut(vectors: list[Any]) -> list[Any]:
            leaves: dict[int, Any] = {}
            for group, joins, vector in zip(self._groups, self._joins, vectors, strict=True):
                shapes = [self._shapes[index] for index in group]
                pieces = _pieces(vector, shapes) if joins else [vector]
                leaves.update(zip(group, pieces, strict=True))
            return [leaves[index] for index in range(len(leaves))]

        return _mapped(tree, cut, self._structure)

    def parameters(self, vectors: nnx.State) -> nnx.State:
        """Parameters that are cut from their vectors; their gradients are joined.

        By itself JAX would pad each gradient to the length of its vector, and add them all up.
        """
        return _parameters(self, vectors)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parameters(of: Vectors, vectors: nnx.State) -> nnx.State:
    return of.cut(vectors)


def _parameters_forward(of: Vectors, vectors: nnx.State) -> tuple[nnx.State, None]:
    return of.cut(vectors), None


def _parameters_backward(of: Vectors, _: None, gradients: nnx.State) -> tuple[nnx.State]:
    # Kept apart from the gradients' shapes, which the optimizer's loops would have otherwise.
    return (jax.tree.map(border, of.joined(gradients)),)


_parameters.defvjp(_parameters_forward, _parameters_backward)


def _vector(leaves: list[Any]) -> Any:
    if _is_nothing(leaves[0]):
        return leaves[0]
    return jnp.concatenate([leaf.ravel() for leaf in leaves])


def _pieces(vector: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
    """The leaves of which `_vector` makes this."""
    if _is_nothing(vector):
        return [vector] * len(shapes)
    sizes = tuple(map(math.prod, shapes))
    ends = [*itertools.accumulate(sizes)]
    begins = [0, *ends[:-1]]
    if len(shapes) == 1:
        pieces = [vector]
    elif on_cpu():
        # Barred, since XLA moves constants into calls, and pieces of a size would differ again.
        pieces = _cut(vector, lax.optimization_barrier([*map(jnp.int32, begins)]), sizes=sizes)
    else:
        pieces = [vector[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@partial(unfused, static_argnames=("sizes",))
def _cut(vector: jax.Array, begins: list[jax.Array], *, sizes: tuple[int, ...]) -> list[jax.Array]:
    """The pieces of a vector that begin at some of its numbers."""
    return [
        lax.dynamic_slice(vector, [begin], [size], allow_negative_indices=False)
        for begin, size in zip(begins, sizes, strict=True)
    ]


def _mapped(
    tree: _Tree, change: Callable[[list[Any]], list[Any]], structure: jax.tree_util.PyTreeDef
) -> _Tree:
    """The tree with the leaves of each `nnx.State` in it changed, in another structure."""

    def changed(node: Any) -> Any:
        if not isinstance(node, nnx.State):
            return node
        return jax.tree.unflatten(structure, change(jax.tree.leaves(node, is_leaf=_is_nothing)))

    return jax.tree.map(changed, tree, is_leaf=lambda node: isinstance(node, nnx.State))


def _is_nothing(node: Any) -> bool:
    """Whether it stands for what an optimizer does not keep."""
    return isinstance(node, optax.MaskedNode)
