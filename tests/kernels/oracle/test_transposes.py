"""The oracle's gradients are the transposes of its operators."""

import numpy as np
import pytest

from pallas_kernels import oracle
from pallas_kernels.conv2d.cases import HARD, TABLE, inputs
from pallas_kernels.haar.filters import filter_bank

pytestmark = pytest.mark.core


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
@pytest.mark.parametrize("size", [(7,), (6, 5), (3, 1, 4)], ids=str)
def test_waverec_is_the_transpose_of_wavedec(size, wavelet):
    ndim, rng = len(size), np.random.default_rng(0)
    dec, _ = filter_bank(wavelet)
    x = rng.normal(size=(2, *size, 3))
    analysed = oracle.wavedec(x, ndim, 3, dec)
    dlevels = [rng.normal(size=level.shape) for level in analysed]
    there = sum(np.vdot(a, d) for a, d in zip(analysed, dlevels, strict=True))
    back = np.vdot(x, oracle.waverec(dlevels, ndim, size, dec))
    np.testing.assert_allclose(there, back, atol=1e-11)


@pytest.mark.parametrize("case", TABLE[:22:3] + HARD, ids=lambda case: case.name)
def test_gradients_of_conv2d_are_every_derivative(case):
    """It is linear in x, in w and in the bias, but for the activation at its end."""
    x, w, bias, dy = inputs(case)
    linear = case.arguments
    activation = linear.pop("activation")
    dx, dw, dbias = oracle.conv2d_vjp(x, w, dy, bias=bias, activation=activation, **linear)
    dz, atol = dy, 1e-11
    if activation is not None:
        z = oracle.conv2d(x, w, bias=bias, **linear)
        up, down = (activated(z + step, activation) for step in (1e-5, -1e-5))
        dz, atol = dy * (up - down) / 2e-5, 1e-8
    want = transposed(lambda a: oracle.conv2d(a, w, **linear), x, dz)
    np.testing.assert_allclose(dx, want, atol=atol)
    want = transposed(lambda a: oracle.conv2d(x, a, **linear), w, dz)
    np.testing.assert_allclose(dw, want, atol=atol)
    axes = (0, 1, 2) if case.layout == "nhwc_hwcf" else (0, 2, 3)
    np.testing.assert_allclose(dbias, dz.sum(axes), atol=atol)


def activated(z, activation):
    """The activation alone: that of a convolution with one tap of 1."""
    one = np.ones((1, 1, 1, 1))
    return oracle.conv2d(z.reshape(-1, 1, 1, 1), one, activation=activation).reshape(z.shape)


def transposed(function, like, dy):
    """The transpose of a linear function, one column after the other."""
    columns = np.eye(like.size).reshape(like.size, *like.shape)
    return np.array([np.vdot(function(column), dy) for column in columns]).reshape(like.shape)
