"""The backward implementation is chosen where a call is differentiated, and not before."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from flash_wtconv_jax import tune
from pallas_kernels.common import device
from pallas_kernels.conv2d import conv2d
from pallas_kernels.conv2d import xla as conv2d_xla
from pallas_kernels.dispatch import tuner, tuning
from pallas_kernels.wtconv import wtconv2d
from pallas_kernels.wtconv import xla as wtconv_xla

pytestmark = pytest.mark.core

X = jnp.ones((1, 3, 2, 5))


def wtconv(x, choice, scale=1.0):
    params = {"base_kernel": jnp.ones((3, 3, 1, 5)), "base_scale": jnp.full(5, scale)}
    return wtconv2d(x, params, implementation=choice)


def convolution(x, choice):
    return conv2d(x, jnp.ones((1, 1, 5, 2), x.dtype), implementation=choice)


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


@pytest.mark.parametrize(("call", "module"), CALLS)
def test_a_pullback_is_chosen_for_where_it_is_called(call, module, monkeypatch):
    """There its uncommitted arrays are computed with, whatever computed the forward pass."""
    asked, x = [], jnp.ones((1, 2, 3, 5), "bfloat16")
    monkeypatch.setattr(module, "unavailable", lambda platform: asked.append(platform))
    with tuning("off"):
        y, pullback = jax.vjp(lambda x: call(x, ["xla", "xla"]), x)
    assert set(asked) == {"cpu"}
    asked.clear()
    elsewhere = SimpleNamespace(platform="gpu", device_kind="an abacus")
    monkeypatch.setattr(device, "current", lambda: elsewhere)
    assert pullback(y)[0].shape == x.shape
    assert asked == ["gpu"]


def test_a_forward_pass_says_nothing_of_the_backward_one(caplog):
    with caplog.at_level(logging.INFO, "flash_wtconv"), tuning("off"):
        convolution(jnp.ones((1, 2, 2, 5)), ["xla", "triton"])
    assert "bwd" not in caplog.text


@pytest.mark.parametrize("transformed", [jax.grad, jax.value_and_grad])
@pytest.mark.parametrize("compiled", [lambda fn: fn, jax.jit])
def test_tune_measures_what_is_differentiated(transformed, compiled, searches, monkeypatch):
    forms = [{}, {"shifted": True}]
    monkeypatch.setattr(wtconv_xla, "search_space", lambda direction, problem: forms)
    used = tune(compiled(transformed(lambda x: wtconv(x, None).sum())), X)
    assert [entry["direction"] for entry in used] == ["fwd", "bwd"]
    assert [label.split()[1] for label in searches] == ["fwd", "bwd"]


def test_what_is_measured_later_is_taken(monkeypatch, searches):
    """A backward pass that JAX has traced with the rule's choice is traced anew."""
    chosen, seen = wtconv_xla.weight_grad, []

    def weight_grad(*args, shifted=None, **kwargs):
        seen.append(shifted)
        return chosen(*args, **kwargs)

    monkeypatch.setattr(wtconv_xla, "weight_grad", weight_grad)
    forms = [{}, {"shifted": True}, {"shifted": False}]
    monkeypatch.setattr(wtconv_xla, "search_space", lambda direction, problem: forms)
    x = jnp.ones((1, 5, 2, 5))

    def gradient():
        seen.clear()
        with tuning("cached"):
            jax.grad(lambda scale: wtconv(x, None, scale).sum())(1.0)
        return list(seen)

    assert gradient() == [None]
    tune(jax.grad(lambda x: wtconv(x, None).sum()), x)
    assert len(gradient()) == 1 and len(searches) == 2


def test_equal_calls_choose_by_times_once(monkeypatch):
    # The first one measures; the second takes what it measured.
    wtconv(X, "auto"), wtconv(X, "auto")
    monkeypatch.setattr(tuner, "fastest", None)
    wtconv(X, "auto")
