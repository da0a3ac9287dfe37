"""The definition of sparse convolution: JAX's dense convolution, and its own transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import oracle


def sites(ndim, size, count, samples=2, seed=0):
    rng = np.random.default_rng(seed)
    cells = rng.choice(samples * size**ndim, count, replace=False)
    return np.stack(np.unravel_index(cells, (samples, *(size,) * ndim)), 1)


def dense(coords, values, size):
    grid = np.zeros((2, *(size,) * (coords.shape[1] - 1), values.shape[1]))
    grid[tuple(coords.T)] = values
    return grid


@pytest.mark.parametrize(
    ("ndim", "kernel", "stride", "dilation", "padding", "groups"),
    [
        (1, 4, 1, 2, 3, 1),
        (2, 3, 2, 1, 1, 2),
        (3, (3, 1, 2), (2, 1, 3), 1, 0, 1),
        (2, 5, 3, 2, 4, 1),
    ],
)
def test_the_full_output_is_jaxs_dense_convolution(ndim, kernel, stride, dilation, padding, groups):
    """Where it lies inside of the dense one: a grid of voxels has no end."""
    rng, size = np.random.default_rng(1), 7
    coords = sites(ndim, size, 12)
    offsets = oracle.sparse_offsets(kernel, ndim, dilation, padding)
    x = rng.normal(size=(len(coords), 4))
    w = rng.normal(size=(len(offsets), groups, 4 // groups, 6 // groups))
    sizes = np.broadcast_to(kernel, ndim)
    taps = w.transpose(0, 2, 1, 3).reshape(*sizes, 4 // groups, 6)
    steps = tuple(np.broadcast_to(stride, ndim).tolist())
    letters = "DHW"[:ndim]
    with jax.enable_x64(True):
        want = lax.conv_general_dilated(
            jnp.asarray(dense(coords, x, size)),
            jnp.asarray(taps),
            steps,
            [(padding, padding)] * ndim,
            rhs_dilation=(dilation,) * ndim,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=groups,
            precision="highest",
        )
    outputs = oracle.sparse_outputs(coords, kernel, stride, dilation, rule="full", padding=padding)
    inside = ((outputs[:, 1:] >= 0) & (outputs[:, 1:] < want.shape[1:-1])).all(1)
    outputs = outputs[inside]
    y = oracle.sparse_conv(coords, x, w, outputs, kernel, stride, dilation, padding=padding)
    grid = np.zeros(want.shape)
    grid[tuple(outputs.T)] = y
    np.testing.assert_allclose(grid, want, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_gradients_are_every_derivative(stride, transposed):
    rng = np.random.default_rng(2)
    coords, outputs = sites(2, 6, 14), sites(2, 6, 9, seed=3)
    x, w, dy = (rng.normal(size=size) for size in ((14, 4), (9, 2, 2, 3), (9, 6)))

    def conv(x, w):
        return oracle.sparse_conv(coords, x, w, outputs, 3, stride, transposed=transposed)

    dx, dw = oracle.sparse_conv_vjp(coords, x, w, outputs, dy, 3, stride, transposed=transposed)
    assert np.abs(conv(x, w)).sum() > 0
    for _ in range(3):
        vx, vw = rng.normal(size=x.shape), rng.normal(size=w.shape)
        np.testing.assert_allclose(np.vdot(conv(vx, w), dy), np.vdot(vx, dx), atol=1e-11)
        np.testing.assert_allclose(np.vdot(conv(x, vw), dy), np.vdot(vw, dw), atol=1e-11)


def test_a_transposed_convolution_is_the_transpose():
    """The convolution that leads from its outputs to its inputs."""
    rng = np.random.default_rng(4)
    fine, coarse = sites(2, 8, 20), sites(2, 4, 9)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(9, 5))
    w = rng.normal(size=(9, 1, 3, 5))
    forth = oracle.sparse_conv(fine, x, w, coarse, 3, 2)
    back = oracle.sparse_conv(coarse, y, w.swapaxes(2, 3), fine, 3, 2, transposed=True)
    np.testing.assert_allclose(np.vdot(forth, y), np.vdot(x, back), atol=1e-11)


def test_outputs():
    one = [[0, 5, -3]]
    assert oracle.sparse_outputs(one, 3, 2).tolist() == [[0, 2, -2]]
    reading = oracle.sparse_outputs(one, 3, 2, rule="full")
    assert reading.tolist() == [[0, 2, -2], [0, 2, -1], [0, 3, -2], [0, 3, -1]]
    made = oracle.sparse_outputs(one, 2, 2, rule="full", transposed=True)
    assert made.tolist() == [[0, 10, -6], [0, 10, -5], [0, 11, -6], [0, 11, -5]]


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
def test_pooling_of_a_full_grid_is_the_dense_one(reduce):
    x = np.random.default_rng(5).normal(size=(16, 3)) - 10
    coords = np.stack(np.unravel_index(np.arange(16), (1, 4, 4)), 1)
    outputs = oracle.sparse_outputs(coords, 2, 2)
    cells = x.reshape(2, 2, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(4, 4, 3)
    got = oracle.sparse_pool(coords, x, outputs, 2, 2, reduce=reduce)
    np.testing.assert_allclose(got, getattr(cells, reduce)(1))
