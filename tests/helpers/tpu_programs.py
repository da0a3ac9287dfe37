"""Programs for a TPU's compiler: dense layers, norms, loops to count, and 64-bit integers."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flash_wtconv_jax.aot import programs
from pallas_kernels.conv2d import conv2d
from pallas_kernels.conv2d.cases import Case
from pallas_kernels.stylize import instance_norm

X = jax.ShapeDtypeStruct((64, 128), jnp.float32)


def nested(outer, inner):
    """`outer * inner` additions of eight rows, one after the other."""

    def kernel(x, y):
        def add(i, total):
            return jnp.exp(total) + x[pl.ds(pl.multiple_of(i % 8 * 8, 8), 8), :]

        def rounds(_, total):
            return jax.lax.fori_loop(0, inner, add, total) * 0.5

        y[...] = jax.lax.fori_loop(0, outer, rounds, jnp.zeros((8, 128)))

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
    return call, (X,)


def stepped(steps):
    """One grid step for each eight rows, and work in every other one alone."""

    def kernel(x, y):
        @pl.when(pl.program_id(0) % 2 == 0)
        def work():
            y[...] = jax.lax.fori_loop(0, 5, lambda _, total: jnp.exp(total), x[...])

    spec = pl.BlockSpec((8, 128), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((8 * steps, 128), jnp.float32)
    return pl.pallas_call(kernel, shape, grid=(steps,), in_specs=[spec], out_specs=spec), (shape,)


def _in_64_bits(program, shape, dtype, direction):
    function, arguments = program(shape, dtype, direction)

    def run(*arguments):
        with jax.enable_x64(True):
            return function(*arguments)

    return run, arguments


wtconv_in_64_bits, haar_in_64_bits = (
    partial(_in_64_bits, program) for program in (programs.wtconv, programs.haar)
)
"""Our kernels where JAX's integers and Python's numbers are 64 bits wide."""


def dense(**fields):
    """A dense layer of ours and the gradients of its images, filters and bias."""
    case = Case(**fields)
    images, filters = (case.n, case.h, case.w, case.c), (case.hf, case.wf, case.c, case.nf)
    if case.layout == "nchw_fchw":
        images, filters = (case.n, case.c, case.h, case.w), (case.nf, case.c, case.hf, case.wf)
    x, w = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in (images, filters))
    bias = jax.ShapeDtypeStruct((case.nf,), jnp.float32)

    def layer(x, w, bias, implementation="mosaic_tpu"):
        rest = {"out_dtype": case.out_dtype, "implementation": implementation}
        return conv2d(x, w, bias=bias, **case.arguments, **rest)

    def run(x, w, bias, dy):
        y, pullback = jax.vjp(layer, x, w, bias)
        return y, *pullback(dy)

    return run, (x, w, bias, jax.eval_shape(partial(layer, implementation="xla"), x, w, bias))


def norm(shape, dtype, residual):
    """An instance norm of ours with a ReLU, and the gradients of its images and parameters."""
    x, parameter = (jax.ShapeDtypeStruct(size, dtype) for size in (shape, shape[-1:]))

    def layer(x, scale, bias, residual):
        rest = {"activation": "relu", "residual": residual, "implementation": "mosaic_tpu"}
        return instance_norm(x, scale, bias, **rest)

    def run(x, scale, bias, residual, dy):
        y, pullback = jax.vjp(layer, x, scale, bias, residual)
        return y, *pullback(dy)

    return run, (x, parameter, parameter, x if residual else None, x)
