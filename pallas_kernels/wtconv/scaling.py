"""The kernels of a layer times their scales, by one launch of ours or by XLA's own.

XLA makes a launch of each product, and on the way back one more of each sum. An implementation that
reads the products from memory can bring a launch of all of them along; the one that computes the
forward pass is asked:

    scale_launches(problem) -> the directions of their use: none, "bwd", or "fwd" and "bwd"
    products(weights, scales, dtypes) -> weights
    scale_sums(gradients, weights, dtypes) -> scales
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.common import device, sharding
from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Taps, Tree
from pallas_kernels.common.vmap import vmap_sequential
from pallas_kernels.wtconv.problem import Problem

Weights = tuple[Taps, jax.Array | None]
"""The taps and the bias, which is multiplied by the scales of the base."""
Scales = Taps
"""The scales: the base's first, then those of each level."""


def products(weights: Weights, scales: Scales, dtypes: Tree) -> Weights:
    """Kernels and bias times their scales, as XLA computes it.

    Args:
        weights: Kernels `[*k, bands, C]` and bias `[C]`, or their gradients.
        scales: Scales `[bands, C]`, of the base `[C]`.
        dtypes: The dtypes of what is returned, like the weights.
    """
    taps, bias = weights
    found = tuple(map(_product, taps, scales)), None if bias is None else _product(bias, scales[0])
    return jax.tree.map(lambda array, dtype: array.astype(dtype), found, dtypes)


def scale_sums(gradients: Weights, weights: Weights, dtypes: Tree) -> Scales:
    """The gradients of the scales, as XLA computes it.

    Args:
        gradients: Those of the products.
        weights: Kernels `[*k, bands, C]` and bias `[C]`.
        dtypes: The dtypes of the scales.
    """
    (dtaps, dbias), (taps, bias) = gradients, weights
    pairs = zip(dtaps, taps, strict=True)
    base, *levels = (_product(dtap, tap).sum(range(tap.ndim - 2)) for dtap, tap in pairs)
    of_base = base[0]
    if dbias is not None and bias is not None:
        of_base = of_base + _product(dbias, bias)
    return tuple(sums.astype(dtype) for sums, dtype in zip((of_base, *levels), dtypes, strict=True))


def scaled(plan: sharding.Plan, problem: Problem, weights: Weights, scales: Scales) -> Weights:
    """Kernels and bias times their scales, in float32 or better.

    Args:
        plan: The plan of the call, whose implementation may have a launch for it.
        problem: The call.
        weights: Kernels `[*k, bands, C]` and bias `[C]`.
        scales: Scales `[bands, C]`, of the base `[C]`.
    """
    taps, bias = weights
    wide = tuple(accumulation_dtype(w.dtype, s.dtype) for w, s in zip(taps, scales, strict=True))
    dtypes = wide, None if bias is None else accumulation_dtype(bias.dtype, scales[0].dtype)
    launches = getattr(plan.module, "scale_launches", None)
    directions = launches(problem) if launches else ()
    if not directions:
        return products(weights, scales, dtypes)
    given = weights, scales
    return _scaled(plan, problem, "fwd" in directions, dtypes, *vary_like(given, given))


def _scaled(
    plan: sharding.Plan,
    problem: Problem,
    launched: bool,
    dtypes: Tree,
    weights: Weights,
    scales: Scales,
) -> Weights:
    """The products, linear in weights and scales, whose derivatives are launches."""
    own, theirs = (jax.tree.map(lambda array: array.dtype, each) for each in (weights, scales))

    def run(weights: Weights, scales: Scales) -> Weights:
        if not launched:
            return products(weights, scales, dtypes)
        return _split(plan, problem, "products", dtypes, weights, scales)

    def in_weights(gradients: Weights, scales: Scales) -> Weights:
        return _scaled(plan, problem, True, own, gradients, scales)

    def in_scales(gradients: Weights, weights: Weights) -> Scales:
        return _summed(plan, problem, theirs, gradients, weights)

    return multilinear(run, (in_weights, in_scales), weights, scales)


def _summed(
    plan: sharding.Plan, problem: Problem, dtypes: Tree, gradients: Weights, weights: Weights
) -> Scales:
    """The gradients of scales, linear in those of products and in weights."""
    theirs, own = (jax.tree.map(lambda array: array.dtype, each) for each in (gradients, weights))

    def run(gradients: Weights, weights: Weights) -> Scales:
        return _split(plan, problem, "scale_sums", dtypes, gradients, weights)

    def in_gradients(scales: Scales, weights: Weights) -> Weights:
        return _scaled(plan, problem, True, theirs, weights, scales)

    def in_weights(scales: Scales, gradients: Weights) -> Weights:
        return _scaled(plan, problem, True, own, gradients, scales)

    return multilinear(run, (in_gradients, in_weights), gradients, weights)


_BY_XLA: dict[str, Callable[..., Tree]] = {"products": products, "scale_sums": scale_sums}


def _split(plan: sharding.Plan, problem: Problem, name: str, dtypes: Tree, *args: Tree) -> Tree:
    """The result of a function of the implementation, of each shard: channels do not mix.

    Where the implementation cannot run, as in a pullback that is called on a CPU, XLA computes it.
    """
    by_xla = _BY_XLA[name]
    if plan.module.unavailable(device.platform()) is not None:
        return by_xla(*args, dtypes)

    def shard(plan: sharding.Plan, place: sharding.Shard, *args: Tree) -> Tree:
        return getattr(plan.module, name, by_xla)(*args, dtypes)

    found = jax.eval_shape(lambda *args: by_xla(*args, dtypes), *args)
    operands, results = (
        tuple(" ".join(["_"] * (array.ndim - 1) + ["c"]) for array in jax.tree.leaves(arrays))
        for arrays in (args, found)
    )
    rule = sharding.Rule(operands, results, frozenset("c"))
    return sharding.split(shard, rule, plan, lambda *_: problem, *args, mapped=vmap_sequential)


def _product(array: jax.Array, factor: jax.Array) -> jax.Array:
    """Their product in float32 or better, the factor's axes being the array's last."""
    dtype = accumulation_dtype(array.dtype, factor.dtype)
    wide = jnp.expand_dims(factor.astype(dtype), range(array.ndim - factor.ndim))
    return array.astype(dtype) * wide
