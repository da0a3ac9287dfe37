"""One implementation of the dense convolution on one case against the oracle."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import quick_jit

from pallas_kernels import oracle
from pallas_kernels.conv2d import conv2d, get_igemm_conv2d
from pallas_kernels.conv2d.cases import TABLE, Case, inputs

LOW = ("bfloat16", "float16")
# A second each: every shape is compiled.
ON_GPU = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (i >= 22))
    for i, case in enumerate(TABLE)
]
NAMES = ("y", "dx", "dw", "dbias")


def arrays(case):
    """x, w, bias and dy of a case in its dtypes."""
    x, w, bias, dy = inputs(case)
    x, w = (jnp.asarray(a, case.dtype) for a in (x, w))
    bias = None if bias is None else jnp.asarray(bias, oracle_dtype(case))
    return x, w, bias, jnp.asarray(dy, case.out_dtype or case.dtype)


def oracle_dtype(case):
    """Of a bias: float32, or float64 where everything is."""
    return "float64" if case.dtype == "float64" else "float32"


def value_and_grads(call, case, jit=jax.jit):
    """The output and its gradients, as one program."""
    x, w, bias, dy = arrays(case)

    def run(x, w, bias, dy):
        y, pullback = jax.vjp(call, x, w, bias)
        return y, *pullback(dy)

    found = zip(NAMES, jit(run)(x, w, bias, dy), strict=True)
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


def expected(case):
    """The oracle's output and, by its linearity, the gradients, of what the dtypes can hold."""
    x, w, bias, dy = (None if a is None else np.asarray(a, np.float64) for a in arrays(case))
    arguments = case.arguments
    activation = arguments.pop("activation")
    run = partial(oracle.conv2d, **arguments)
    want = {"y": run(x, w, bias=bias, activation=activation)}
    z = run(x, w, bias=bias)
    if activation == "relu":
        dy = dy * (z > 0)
    elif activation == "gelu":
        # The centred difference of the oracle's own epilogue.
        one = np.ones((1, 1, 1, 1))
        epilogue = lambda a: oracle.conv2d(a.reshape(-1, 1, 1, 1), one, activation="gelu")  # noqa: E731
        slope = (epilogue(z + 1e-5) - epilogue(z - 1e-5)) / 2e-5
        dy = dy * slope.reshape(z.shape)
    want["dx"] = transposed(lambda a: run(a, w), x, dy)
    want["dw"] = transposed(lambda a: run(x, a), w, dy)
    if bias is not None:
        axes = (0, 1, 2) if case.layout == "nhwc_hwcf" else (0, 2, 3)
        want["dbias"] = dy.sum(axes)
    return want


def transposed(linear, like, dy):
    """The transpose of a linear function, one column after the other."""
    columns = np.eye(like.size).reshape(like.size, *like.shape)
    return np.array([np.vdot(linear(column), dy) for column in columns]).reshape(like.shape)


def plain(case):
    """`lax.conv_general_dilated` in x's dtype, without further care; the gradients JAX's own."""

    def call(x, w, bias):
        dimensions = ("NHWC", "HWIO", "NHWC")
        if case.layout == "nchw_fchw":
            dimensions = ("NCHW", "OIHW", "NCHW")
        stride, dilation = (
            (v, v) if isinstance(v, int) else v for v in (case.stride, case.dilation)
        )
        padding = case.padding
        if isinstance(padding, int):
            padding = (padding, padding)
        if isinstance(padding, tuple):
            padding = [(p, p) if isinstance(p, int) else p for p in padding]
        if padding == "reflect":
            reach = [d * (k - 1) for d, k in zip(dilation, (case.hf, case.wf), strict=True)]
            pads = [(0, 0), *((r // 2, r - r // 2) for r in reach), (0, 0)]
            if case.layout == "nchw_fchw":
                pads = [pads[i] for i in (0, 3, 1, 2)]
            x, padding = jnp.pad(x, pads, mode="reflect"), "VALID"
        y = jax.lax.conv_general_dilated(
            x,
            w,
            stride,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=dimensions,
            feature_group_count=case.groups,
        )
        if bias is not None:
            bias = bias.astype(y.dtype)
            y = y + (bias if case.layout == "nhwc_hwcf" else bias[:, None, None])
        if case.activation == "gelu":
            y = jax.nn.gelu(y, approximate=False)
        elif case.activation == "relu":
            y = jax.nn.relu(y)
        return y.astype(case.out_dtype or case.dtype)

    return call


def error(got, want):
    """Greatest error as a fraction of the root mean square."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    if want.size == 0:
        return 0.0
    return np.abs(got - want).max() / max(np.sqrt(np.mean(want**2)), 1e-6)


def assert_close(case, got, want):
    """Output and gradients are the oracle's, in shape and value; dtypes are the arguments'."""
    x, w, bias, dy = arrays(case)
    like = {"y": dy, "dx": x, "dw": w} | ({} if bias is None else {"dbias": bias})
    assert {name: v.dtype for name, v in got.items()} == {n: like[n].dtype for n in got}
    if case.dtype in LOW:
        bar = value_and_grads(plain(case), case, quick_jit)
        eps = float(jnp.finfo(case.dtype).eps)
        bounds = {name: max(2 * error(bar[name], want[name]), eps) for name in got}
    else:
        # The slope of GELU is known to 1e-10.
        bounds = dict.fromkeys(got, {"float32": 1e-5, "float64": 1e-9}[case.dtype])
    found = {name: error(value, want[name]) for name, value in got.items()}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= bounds[name]} == {}


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
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, whole = jax.sharding.PartitionSpec("n"), jax.sharding.PartitionSpec()
    local = jax.shard_map(
        ours(case, implementation),
        mesh=mesh,
        in_specs=(batch, whole, whole),
        out_specs=batch,
        check_vma=check_vma,
    )
    got, want = (value_and_grads(call, case) for call in (local, plain(case)))
    atol = 1e-4 if dtype == "float32" else 0.05
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=atol)
