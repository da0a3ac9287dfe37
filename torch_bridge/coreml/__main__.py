"""`python -m torch_bridge.coreml`: Core ML packages, written, checked and evaluated anywhere."""

import typer

from flash_wtconv_jax.cli import run


def _app() -> None:
    from torch_bridge.coreml.check import check
    from torch_bridge.coreml.evaluate import evaluate
    from torch_bridge.coreml.export import export

    app = typer.Typer(
        name="python -m torch_bridge.coreml",
        help="Core ML packages of wavelet convolutions.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    app.command()(export)
    app.command()(evaluate)
    app.command()(check)
    app()


if __name__ == "__main__":
    run(_app)
