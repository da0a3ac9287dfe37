"""The README's code runs as it is shown, each block by itself."""

import re
from pathlib import Path

import pytest

from flash_wtconv_jax.models import convnext

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.wide
def test_each_block_of_code_runs_alone(monkeypatch, tmp_path):
    # Smaller networks by the same names: what is tested is the code that readers copy.
    monkeypatch.setattr(convnext, "_TINY", {"depths": (1, 1), "dims": (4, 4)})
    monkeypatch.setattr(convnext, "_WAVELET", {"kernel_size": 3, "levels": (1, 1)})
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", README.read_text(), re.DOTALL)
    found = {}
    for block in blocks:
        names = {}
        exec(block, names)
        for name in ("y", "logits", "losses", "replaced"):
            if name in names:
                found.setdefault(name, []).append(names[name])
    assert [y.shape for y in found["y"]] == [(2, 128, 128, 64)] * 2
    assert [logits.shape for logits in found["logits"]] == [(1, 1000)]
    assert found["replaced"] == [["stages.0.blocks.0.conv_dw", "stages.1.blocks.0.conv_dw"]]
    # Both loops learn.
    assert [losses[-1] < 0.5 * losses[0] for losses in found["losses"]] == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["wtconvnext.safetensors"]
