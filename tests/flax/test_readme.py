"""The README's code runs as it is shown, one block after the other."""

import re
from pathlib import Path

import pytest

from flash_wtconv_jax.models import convnext

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.wide
def test_code_blocks_run_in_order(monkeypatch, tmp_path):
    # Smaller networks by the same names: what is tested is the code that readers copy.
    monkeypatch.setattr(convnext, "_TINY", {"depths": (1, 1), "dims": (4, 4)})
    monkeypatch.setattr(convnext, "_WAVELET", {"kernel_size": 3, "levels": (1, 1)})
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (2, 128, 128, 64)
    assert names["logits"].shape == (1, 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["wtconvnext.safetensors"]
