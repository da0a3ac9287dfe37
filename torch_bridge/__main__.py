"""`python -m torch_bridge`: the commands of the PyTorch side."""

from flash_wtconv_jax.cli import run


def _app() -> None:
    # Here, so that a missing PyTorch is told in one line too.
    from torch_bridge.check import app

    app()


if __name__ == "__main__":
    run(_app)
