"""The backward implementation is chosen where a call is differentiated, and not before."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.conv2d import conv2d
from pallas_kernels.conv2d import xla as conv2d_xla
from pallas_kernels.wtconv import wtconv2d
from pallas_kernels.wtconv import xla as wtconv_xla

pytestmark = pytest.mark.core

X = jnp.ones((1, 3, 2, 5))


def wtconv(x, choice):
    params = {"base_kernel": jnp.ones((3, 3, 1, 5)), "base_scale": jnp.ones(5)}
    return wtconv2d(x, params, implementation=choice)


def convolution(x, choice):
    return conv2d(x, jnp.ones((1, 1, 5, 2)), implementation=choice)


CALLS = [(wtconv, wtconv_xla), (convolution, conv2d_xla)]


@pytest.mark.parametrize(("call", "module"), CALLS)
def test_what_computes_no_gradients_computes_outputs(call, module, monkeypatch):
    def check(direction, problem):
        if direction == "bwd":
            raise NotImplementedError("does not do that")

    monkeypatch.setattr(module, "check", check)
    # A list of its own, since JAX remembers what it has traced with another.
    choice = ["xla", "xla", "xla"]
    assert call(X, choice).shape[:3] == X.shape[:3]
    with pytest.raises(NotImplementedError, match="bwd.*does not do that"):
        jax.grad(lambda x: call(x, choice).sum())(X)


@pytest.mark.parametrize(("call", "module"), CALLS)
def test_only_what_is_differentiated_is_timed(call, module, monkeypatch, searches):
    space = [{}, {}]
    monkeypatch.setattr(module, "search_space", lambda direction, problem: space, raising=False)
    x = jnp.ones((2, 3, 2, 5))
    call(x, "auto")
    assert [label.split()[1] for label in searches] == ["fwd"]
    jax.grad(lambda x: call(x, "auto").sum())(x)
    assert [label.split()[1] for label in searches] == ["fwd", "bwd"]


def test_the_environment_chooses_each_direction(monkeypatch):
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_BWD", "triton")
    assert wtconv(X, None).shape == X.shape
    with pytest.raises(NotImplementedError, match="FLASH_WTCONV_WTCONV_BWD='triton'"):
        jax.grad(lambda x: wtconv(x, None).sum())(X)
