"""`python -m torch_bridge`: the commands of the PyTorch side."""

import typer

from flash_wtconv_jax.cli import run


def _app() -> None:
    # Here, so that a missing PyTorch is told in one line too.
    from torch_bridge.bench import bench
    from torch_bridge.check import check
    from torch_bridge.compare import compare

    app = typer.Typer(
        name="python -m torch_bridge",
        help="Wavelet and sparse convolutions for PyTorch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    app.command()(check)
    app.command()(bench)
    app.command()(compare)
    app()


if __name__ == "__main__":
    run(_app)
