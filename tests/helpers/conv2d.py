"""One implementation of the dense convolution on one case against the oracle."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sharded import over_the_batch

from pallas_kernels import oracle
from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.conv2d import (
    api,
    baseline_jax,
    conv2d,
    get_igemm_conv2d,
    moments,
    vjp,
    whole_rows,
)
from pallas_kernels.conv2d.cases import TABLE, Case

# A second each: every shape is compiled.
ON_GPU = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (i >= 22))
    for i, case in enumerate(TABLE)
]
NAMES = ("y", "dx", "dw", "dbias")


def arrays(case):
    """x, w, bias and dy of a case in its dtypes."""
    return jax.tree.map(jax.device_put, case.drawn())


def value_and_grads(call, case):
    """The output and its gradients, as one program."""
    x, w, bias, dy = arrays(case)

    def run(x, w, bias, dy):
        y, pullback = jax.vjp(call, x, w, bias)
        return y, *pullback(dy)

    found = zip(NAMES, jax.jit(run)(x, w, bias, dy), strict=True)
    return {name: value for name, value in found if value is not None}


def ours(case, implementation=None):
    def call(x, w, bias):
        return conv2d(
            x,
            w,
            bias=bias,
            out_dtype=case.out_dtype,
            implementation=implementation,
            **case.arguments,
        )

    return call


def plain(case):
    """The baseline as a function of x, filters and bias."""
    return partial(baseline_jax.conv2d, out_dtype=case.out_dtype, **case.arguments)


def plain_results(case):
    """The baseline's results of a case, and its gradients."""
    return value_and_grads(plain(case), case)


def assert_close(case, got, want):
    """Output and gradients are the oracle's, in shape and value; dtypes are the arguments'."""
    x, w, bias, dy = arrays(case)
    like = {"y": dy, "dx": x, "dw": w} | ({} if bias is None else {"dbias": bias})
    assert {name: v.dtype for name, v in got.items()} == {n: like[n].dtype for n in got}
    chex.assert_trees_all_equal_shapes(got, {name: want[name] for name in got})
    allowed = bounds(case, plain_results)
    found = {name: worst(value, want[name]) for name, value in got.items()}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


def assert_oracle(case, implementation=None):
    """Output and gradients of a case are the oracle's."""
    assert_close(case, value_and_grads(ours(case, implementation), case), expected(case))


def assert_igemm(case, implementation):
    """The compiled product of a case's images and filters is the oracle's."""
    kernel, _ = get_igemm_conv2d(
        case.layout, *case[:8], case.dtype, case.out_dtype, implementation=implementation
    )
    x, w, _, _ = arrays(case)
    want = oracle.conv2d(x, w, **case.arguments)
    np.testing.assert_allclose(kernel(x, w), want, rtol=1e-3, atol=1e-3)


def assert_sharded(implementation, check_vma, dtype="float32"):
    """A `shard_map` over the batch, of one device, changes nothing."""
    case = Case(2, 9, 8, 4, 3, 3, 6, padding="reflect", bias=True, activation="gelu", dtype=dtype)
    local = over_the_batch(ours(case, implementation), (True, False, False), check_vma)
    got, want = (value_and_grads(call, case) for call in (local, plain(case)))
    atol = 1e-4 if dtype == "float32" else 0.05
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=atol)


WHOLE_ROWS = (
    # The channels are fewer, of which two outputs are one, then the features, by strips; strides,
    # dilation, zeros and mirrored edges.
    Case(2, 6, 8, 3, 5, 7, 8, padding="reflect", bias=True),
    Case(1, 13, 10, 8, 3, 5, 3, (2, 1), ((1, 0), (3, 1)), (1, 2), layout="nchw_fchw", bias=True),
    Case(1, 6, 8, 2, 3, 4, 2, (1, 2), "SAME", dtype="float16"),
    Case(1, 7, 9, 6, 2, 3, 2, (1, 3), ("reflect", ((1, 0), (2, 2)))),
    Case(2, 4, 5, 4, 3, 3, 2, padding="reflect", bias=True, upsample=2),
)
"""Cases of few channels or features, of which a row of taps may be multiplied as one."""


def assert_whole_rows(case, module, monkeypatch, config=None):
    """Output and gradients are the oracle's where a row of taps is multiplied as one."""
    *given, dy = arrays(case)
    how = case.stride, case.padding, case.dilation, case.groups, case.upsample, case.layout
    window = api.checked_window(given[0].shape, given[1].shape, *how)
    plan = vjp.Plan(module, config, window, None, config, None, whole_rows=True)
    widths = []
    forward = module.forward

    def recorded(x, w, bias, *, window, **rest):
        widths.append(window.filters(w.shape)[1])
        return forward(x, w, bias, window=window, **rest)

    monkeypatch.setattr(module, "forward", recorded)
    monkeypatch.setattr(whole_rows, "_CACHED", 1)
    got = {"y": jax.jit(vjp.timed_function(plan, "fwd", None, dy.dtype))(*given)}
    backward = jax.jit(vjp.timed_function(plan, "bwd", None, dy.dtype))
    got |= dict(zip(("dx", "dw"), backward(*given[:2], dy), strict=True))
    assert set(widths) == {1}
    assert_close(case, got, {name: expected(case)[name] for name in got})


MOMENTS = (
    # Tiles in part, several of an image, features that fill none; whole ones, and an epilogue;
    # upsampled; a pixel.
    Case(2, 5, 11, 4, 3, 3, 20, padding=1, dtype="float16"),
    Case(1, 8, 8, 3, 1, 1, 40, bias=True, activation="relu", dtype="float16"),
    Case(2, 5, 4, 3, 3, 3, 6, padding="reflect", dtype="float16", upsample=2),
    Case(3, 1, 1, 4, 1, 1, 5, dtype="float16"),
)
"""Cases of which the moments are asked, of pixels of 16 bits."""


def assert_moments(case, module, config=None, mean=0.0):
    """An implementation's moments are those of its output, of each image.

    Args:
        case: The case.
        module: The implementation.
        config: Its tiles.
        mean: What is added to the output; the deviations are about 1.
    """
    x, w, bias, _ = arrays(case)
    if mean:
        bias = jnp.full(case.nf, mean, jnp.float32)
    how = case.stride, case.padding, case.dilation, case.groups, case.upsample, case.layout
    window = api.checked_window(x.shape, w.shape, *how)
    plan = vjp.Plan(module, config, window, None, config, None)
    run = jax.jit(vjp.conv2d_with_moments, static_argnums=(0, 1, 2))
    y, tiles = run(plan, case.activation, jnp.dtype("float32"), x, w, bias)
    wide = [None if a is None else np.asarray(a, np.float64) for a in (x, w, bias)]
    want = oracle.conv2d(*wide[:2], bias=wide[2], **case.arguments)
    # Upsampled, taps of one pixel are added before the product, and rounded: outputs of about 1 are
    # off by 2^-9 in bfloat16, and the worst of hundreds of thousands by five times that.
    rounded = 0.01 if case.dtype == "bfloat16" and case.upsample == 2 else 2e-3
    np.testing.assert_allclose(y, want, atol=rounded * (1 + mean / 1000))
    axes = (1, 2) if case.layout == "nhwc_hwcf" else (2, 3)
    near, found = moments.combined(tiles)
    pixels = np.prod([want.shape[axis] for axis in axes])
    np.testing.assert_array_equal(found.counts, np.full(case.n, pixels))
    of = np.asarray(y, np.float64)
    mean_of = np.asarray(near, np.float64) + np.asarray(found.mean, np.float64)
    np.testing.assert_allclose(mean_of, of.mean(axes), atol=1e-6, rtol=2e-7)
    # The last bit of a mean is as much of a deviation of about 1 as its size.
    rtol = max(1e-5, mean * float(jnp.finfo("float32").eps))
    np.testing.assert_allclose(found.squares, of.var(axes) * pixels, rtol=rtol, atol=1e-9)
