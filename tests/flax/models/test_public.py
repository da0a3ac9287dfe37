"""Networks from files by path and from public checkpoints by name."""

import hashlib
import io
import urllib.error
import urllib.request

import numpy as np
import platformdirs
import pytest
from flax import nnx

from flash_wtconv_jax import checkpoints, models
from flash_wtconv_jax.models import public

CONFIG = models.ConvNeXtConfig(depths=(1,), dims=(4,), levels=(1,), num_classes=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A state dict of a small network, as timm names it."""
    path = tmp_path_factory.mktemp("public") / "small.safetensors"
    model = models.ConvNeXt(CONFIG, rngs=nnx.Rngs(0))
    state_dict = checkpoints.to_torch(checkpoints.variables_of(model))
    checkpoints.write_state_dict(path, state_dict)
    return path


@pytest.fixture
def home(monkeypatch, tmp_path):
    """The user's folder of caches."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return tmp_path


def answering(monkeypatch, content, length):
    """Lets the network answer with so many bytes."""

    def urlopen(url, timeout):
        answer = io.BytesIO(content)
        answer.headers = {"Content-Length": str(length)}
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_a_file_is_loaded_if_its_checksum_is_right(file):
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    assert models.from_pretrained(file, sha256=right.upper()).config == CONFIG
    with pytest.raises(ValueError, match=f"has the sha256 {right}, expected {'0' * 64}"):
        models.from_pretrained(file, sha256="0" * 64)


def test_a_public_checkpoint_is_fetched_once(monkeypatch, home, file):
    content = file.read_bytes()
    one = public.Public("here", "MIT", "https://host.invalid/small.safetensors")
    monkeypatch.setitem(public.PUBLIC, "small", one)
    answering(monkeypatch, content[:-9], len(content))
    with pytest.raises(ConnectionError, match=f"it ended after {len(content) - 9} of"):
        models.from_pretrained("small")
    answering(monkeypatch, content, len(content))
    before = checkpoints.variables_of(models.from_pretrained("small"))["params"]
    monkeypatch.delattr(urllib.request, "urlopen")
    after = checkpoints.variables_of(models.from_pretrained("small"))["params"]
    np.testing.assert_array_equal(before["head"]["fc"]["kernel"], after["head"]["fc"]["kernel"])


def test_without_a_network_it_says_what_to_do(monkeypatch, home):
    def urlopen(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ConnectionError, match="Name or service not known. Without a network, copy"):
        models.from_pretrained("convnext_tiny")
    with pytest.raises(FileNotFoundError, match="fetch it by hand from https://github.com/BGU"):
        models.from_pretrained("wtconvnext_tiny")
