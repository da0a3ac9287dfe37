"""A training on two GPUs of a host, killed and gone on with on one, and by two processes."""

import jax
import pytest

pytest.importorskip("grain")

from helpers.training import (
    SAID,
    SMALL,
    WIDE,
    End,
    assert_same_images,
    in_processes,
    in_two_processes,
    killed_and_gone_on_with,
    seeing,
    write_images,
)

from flash_wtconv_jax.train.images import settings

GPUS = jax.local_device_count() if jax.default_backend() == "gpu" else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs of one host, here are {GPUS}"),
]
# Programs for one and for two GPUs sum in another order, which the optimizer makes more of.
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "data"
    write_images(folder)
    return settings.resolved(SAID, SMALL, WIDE, {"data": {"folder": str(folder)}})


@pytest.fixture(scope="module")
def whole(said, tmp_path_factory):
    """The folder of a training on one GPU that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert in_processes(said, out, [End()], seeing(1)) == [0]
    return out


@pytest.mark.parametrize("axis", ["data", "fsdp", "model"])
def test_killed_on_two_gpus_it_goes_on_with_one(said, whole, axis, tmp_path):
    killed_and_gone_on_with(said, tmp_path / "run", {axis: 2}, 7)
    assert_same_images(whole, tmp_path / "run", ROUNDING)


def test_two_processes_of_a_gpu_each_train_as_one(said, whole, tmp_path):
    assert in_two_processes(said, tmp_path / "run") == [0, 0]
    assert_same_images(whole, tmp_path / "run", ROUNDING)
