"""The layers in linen, nnx and PyTorch are one function: ten steps of SGD go the same way."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

import flash_wtconv_jax as flash
from flash_wtconv_jax import checkpoints

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402

CHANNELS, KERNEL, LEVELS, STEPS, RATE = 4, 3, 2, 10, 0.5
X, TARGET = np.random.default_rng(0).normal(size=(2, 2, 9, 14, CHANNELS)).astype(np.float32)


def square(y, target):
    return ((y - target) ** 2).mean()


def in_linen(params):
    layer = flash.WTConv2d(CHANNELS, KERNEL, LEVELS)

    def loss(params):
        return square(layer.apply({"params": params}, X), TARGET)

    step = jax.jit(lambda p: jax.tree.map(lambda v, g: v - RATE * g, p, jax.grad(loss)(p)))
    for _ in range(STEPS):
        params = step(params)
    return params


def in_nnx(params):
    layer = flash.nnx.WTConv2d(CHANNELS, KERNEL, LEVELS, rngs=nnx.Rngs(0))
    checkpoints.load_into(layer, {"params": params})

    @nnx.jit
    def step(layer):
        gradients = nnx.grad(lambda layer: square(layer(X), TARGET))(layer)
        state = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda v, g: v - RATE * g, state, gradients))

    for _ in range(STEPS):
        step(layer)
    return checkpoints.variables_of(layer)["params"]


def in_torch(implementation, device, params):
    layer = torch_bridge.WTConv2d(
        *(CHANNELS, CHANNELS, KERNEL),
        wt_levels=LEVELS,
        device=device,
        implementation=implementation,
    )
    torch_bridge.from_jax({"params": params}, layer)
    optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], RATE)
    x, target = (torch.from_numpy(a).movedim(-1, 1).to(device) for a in (X, TARGET))
    for _ in range(STEPS):
        optimiser.zero_grad()
        square(layer(x), target).backward()
        optimiser.step()
    return torch_bridge.to_jax(layer)["params"]


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(in_nnx, id="nnx"),
        pytest.param(partial(in_torch, "eager", "cpu"), id="torch eager"),
        pytest.param(partial(in_torch, "eager", "cuda"), id="cuda eager", marks=pytest.mark.gpu),
        pytest.param(partial(in_torch, "triton", "cuda"), id="cuda triton", marks=pytest.mark.gpu),
        pytest.param(partial(in_torch, "cuda", "cuda"), id="cuda cuda", marks=pytest.mark.gpu),
    ],
)
def test_ten_steps_of_sgd(train):
    start = flash.WTConv2d(CHANNELS, KERNEL, LEVELS).init(jax.random.key(1), X)["params"]
    want, got = in_linen(start), train(start)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
        assert np.abs(value - start[name]).max() > 1e-3, name
