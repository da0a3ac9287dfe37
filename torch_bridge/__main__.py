"""`python -m torch_bridge`: the commands of the PyTorch side."""

from flash_wtconv_jax.cli import run
from torch_bridge.check import app

if __name__ == "__main__":
    run(app)
