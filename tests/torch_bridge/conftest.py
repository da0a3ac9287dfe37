"""Fixtures of the PyTorch layers' tests."""

from contextlib import nullcontext

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On arrays this small threads only wait for each other."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """Or PyTorch rounds the factors of a convolution to 10 bits on a GPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """CUDA's kernels for the CPU are built where all tests find them."""
    pytest.importorskip("torch", reason="torch is not installed")
    from helpers.cuda import folder

    from torch_bridge.wtconv.on_cpu import cuda

    monkeypatch.setattr(cuda, "TemporaryDirectory", lambda: nullcontext(folder()))


@pytest.fixture
def many_compilations():
    """Or a ninth test that compiles one function exceeds what PyTorch compiles of it."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1000):
        yield


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    import torch

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
