"""The command line: version, help, info, erf and demo, and errors of one line."""

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import flash_wtconv_jax
from flash_wtconv_jax import checkpoints, cli, environment, models
from flash_wtconv_jax.bench import sparse
from flash_wtconv_jax.cli import tables
from flash_wtconv_jax.cli.bench import tell
from flash_wtconv_jax.cli.messages import say
from pallas_kernels import dispatch
from pallas_kernels.conv2d.shapes import SHAPES
from pallas_kernels.depthwise.shapes import FOR_PLATFORM as IMAGES
from pallas_kernels.wtconv.shapes import FOR_PLATFORM
from pallas_kernels.wtconv.shapes import IMAGES as LAYERS

runner = CliRunner()


def run(*arguments, **options):
    return runner.invoke(cli.app, [str(argument) for argument in arguments], **options)


@pytest.fixture
def fail(monkeypatch, capsys):
    """Runs the program as its script does, and returns the one line that it fails with."""

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["flash-wtconv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code not in (0, None)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run_main


def test_the_version_is_the_package_s():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"flash-wtconv {flash_wtconv_jax.__version__}"


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("info", "demo", "erf", "convert", "bench"):
        assert f" {command} " in result.output


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("MemoryError")])
def test_what_is_too_large_is_one_line(capsys, error):
    def app():
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(app)
    assert (stopped.value.code, capsys.readouterr().err) == (1, "error: MemoryError\n")


@pytest.mark.parametrize(("nodes", "platforms"), [((), "cpu"), (("/dev/nvidia0",), None)])
def test_no_command_line_looks_for_a_tpu_where_no_accelerator_is(monkeypatch, nodes, platforms):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(cli, "find_spec", lambda name: name)
    monkeypatch.setattr(cli.Path, "glob", lambda *_: iter(nodes))
    seen = []
    cli.run(lambda: seen.append(os.environ.get("JAX_PLATFORMS")))
    assert seen == [platforms]


def test_a_name_that_the_encoding_lacks_is_printed_escaped(monkeypatch, tmp_path):
    checkpoints.write_state_dict(
        tmp_path / "a.safetensors",
        {"base_weight": np.ones((2, 1, 3, 3)), "base_scale": np.ones((1, 2, 1, 1))},
    )
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    names = [str(tmp_path / name) for name in ("a.safetensors", "\u65e5\u672c.safetensors")]
    monkeypatch.setattr(sys, "argv", ["flash-wtconv", "convert", *names])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert rb"wrote " in printed.getvalue() and rb"\u65e5\u672c.safetensors" in printed.getvalue()
    assert (tmp_path / "\u65e5\u672c.safetensors").is_file()


def test_a_message_that_nobody_reads_fails_nothing(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patch, os.fdopen(write, "w") as nobody:
        patch.setattr(sys, "stdout", nobody)
        say("into a closed pipe")
        say("and once more")


class TestInfo:
    def test_prints_device_versions_and_operators(self):
        result = run("info")
        assert result.exit_code == 0
        assert environment.versions()["jax"] in result.output
        for word in ("cpu", "wtconv", "haar", "xla", "available"):
            assert word in result.output

    def test_json_says_the_same(self):
        report = json.loads(run("info", "--json").output)
        assert report["versions"] == environment.versions()
        assert report["device"] == environment.device()
        assert report["operators"]["wtconv"]["xla"] is None

    def test_says_why_not(self, monkeypatch):
        class Operator:
            name = "sparse"

            def status(self, platform):
                return [("triton", f"needs a [/GPU], this is {platform}"), ("xla", None)]

        monkeypatch.setattr(dispatch, "operators", lambda: [Operator()])
        output = run("info").output
        assert "unavailable: needs a [/GPU], this is cpu" in output
        assert json.loads(run("info", "--json").output)["operators"] == {
            "sparse": {"triton": "needs a [/GPU], this is cpu", "xla": None}
        }

    def test_cuts_no_reason(self, monkeypatch):
        class Operator:
            name = "sparse"

            def status(self, platform):
                return [("triton", f"No module named {'long_' * 20}name")]

        monkeypatch.setattr(dispatch, "operators", lambda: [Operator()])
        assert f"unavailable: No module named {'long_' * 20}name" in run("info").output
        terminal = Console(file=io.StringIO(), width=80, force_terminal=True)
        monkeypatch.setattr(tables, "plain_console", lambda: terminal)
        run("info")
        assert "…" not in terminal.file.getvalue()

    def test_without_a_device_says_so(self, monkeypatch):
        def no_device():
            raise RuntimeError("Unable to initialize backend 'cuda'\nlong explanation")

        monkeypatch.setattr(environment, "device", no_device)
        result = run("info")
        assert result.exit_code == 0
        assert "0 x none: Unable to initialize backend 'cuda'" in result.output
        assert "long explanation" not in result.output


@pytest.mark.wide
@pytest.mark.skipif(
    any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="the plugin that must not be installed is",
)
def test_a_platform_that_is_not_installed_is_one_line(networks, tmp_path):
    # A platform is chosen once a process, so this takes one of its own, for all commands.
    code = f"""
import sys
from flash_wtconv_jax import cli
for command in (
    "info",
    "demo --out {tmp_path}/demo",
    "bench wtconv --shape convnext_t_stage4 --out {tmp_path}",
    "erf {networks}/plain --out {tmp_path}/erf.png",
    "convert {networks}/plain {tmp_path}/a.safetensors",
):
    sys.argv = ["flash-wtconv", *command.split()]
    try:
        cli.main()
    except SystemExit as stopped:
        print(command.split()[0], stopped.code, file=sys.stderr)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    reason = "error: JAX starts no device (JAX_PLATFORMS='cuda'): its plugin is not installed"
    assert result.stderr.splitlines() == [
        "info 0",
        *(line for name in ("demo", "bench", "erf", "convert") for line in (reason, f"{name} 1")),
    ]
    assert "0 x none: JAX starts no device" in result.stdout
    assert "unavailable: no device" in result.stdout and "a none" not in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for name, levels in (("wavelet", (2,)), ("plain", None)):
        config = models.ConvNeXtConfig(
            depths=(1,), dims=(4,), levels=levels, kernel_size=3, patch_size=1
        )
        network = nnx.jit(lambda c=config: models.ConvNeXt(c, rngs=nnx.Rngs(0)))()
        models.save_network(folder / name, network)
    return folder


class TestErf:
    @pytest.mark.wide
    def test_draws_two_checkpoints(self, networks, tmp_path):
        out = tmp_path / "erf.png"
        result = run("erf", networks / "wavelet", networks / "plain", "--out", out, "--size", 24)
        assert result.exit_code == 0, result.output
        assert out.read_bytes().startswith(b"\x89PNG")
        assert f"wrote {out}" in result.output.replace("\n", "")
        for line, name in zip(result.output.splitlines(), ("wavelet", "plain"), strict=False):
            assert line.startswith(f"{networks / name}: 50% in ")

    @pytest.mark.wide
    def test_draws_a_file_of_weights(self, networks, tmp_path):
        weights, out = tmp_path / "weights.safetensors", tmp_path / "erf.png"
        assert run("convert", networks / "wavelet", weights).exit_code == 0
        result = run("erf", weights, "--out", out, "--size", 8)
        assert result.exit_code == 0, result.output
        assert out.is_file()

    def test_what_is_wrong_is_said_in_a_line(self, fail, networks, tmp_path):
        pytest.importorskip("matplotlib")
        out = tmp_path / "erf.png"
        assert "no file or folder" in fail("erf", tmp_path / "missing", "--out", out)
        (tmp_path / "notes.txt").touch()
        assert "expected .safetensors, .pth, .pt or .pth.tar" in fail(
            "erf", tmp_path / "notes.txt", "--out", out
        )
        (tmp_path / "notes.txt").unlink()
        assert "no Orbax checkpoint" in fail("erf", tmp_path, "--out", out)
        assert "no folder" in fail("erf", networks / "plain", "--out", tmp_path / "a" / "b.png")
        assert "extension '.doc'" in fail("erf", networks / "plain", "--out", tmp_path / "b.doc")
        assert not list(tmp_path.iterdir())


class TestDemo:
    @pytest.fixture
    def training(self):
        return pytest.importorskip("flash_wtconv_jax.train.digits", exc_type=ImportError)

    def test_shows_progress_and_names_its_files(self, training, monkeypatch, tmp_path):
        def run_demo(out, *, seed, epochs, on_epoch):
            assert (seed, epochs) == (3, 2)
            done = training.History([1.0] * epochs, [0.5] * epochs)
            for name in training.NETWORKS:
                for seeds in range(training.SEEDS):
                    on_epoch(name, [done] * seeds + [training.History([1.0], [0.5])])
                    on_epoch(name, [done] * (seeds + 1))
            for name in training.FILES:
                (out / name).touch()
            network = {"accuracy": 0.975, "least_accuracy": 0.96, "greatest_accuracy": 0.99}
            network |= {"parameters": 14386, "seconds": 4.2}
            return {"networks": {"WTConv": network}, "seconds": 12.3}

        monkeypatch.setattr(training, "run_demo", run_demo)
        result = run("demo", "--out", tmp_path, "--seed", 3, "--epochs", 2)
        assert result.exit_code == 0, result.output
        assert "6/6 epochs" in result.output
        words = " ".join(result.output.split())
        assert "WTConv: 97.5% of the held-out strips read rightly (96.0% to 99.0% by seed)" in words
        assert "14,386 parameters, 4 s a training" in words
        for name in training.FILES:
            assert str(tmp_path / name) in result.output

    def test_an_interrupt_is_one_line(self, training, monkeypatch, fail, tmp_path):
        def interrupted(out, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "run_demo", interrupted)
        assert "interrupted" in fail("demo", "--out", tmp_path)

    def test_a_full_disk_is_one_line(self, training, monkeypatch, fail, tmp_path):
        def full(out, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(training, "run_demo", full)
        assert "No space left on device" in fail("demo", "--out", tmp_path)

    def test_a_file_in_the_way_is_one_line(self, training, fail, tmp_path):
        (tmp_path / "demo").write_text("")
        assert "is a file, expected a folder" in fail("demo", "--out", tmp_path / "demo")

    def test_a_missing_package_is_one_line(self, training, monkeypatch, fail, tmp_path):
        def without(out, **options):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

        monkeypatch.setattr(training, "run_demo", without)
        assert "sklearn is not installed: pip install" in fail("demo", "--out", tmp_path)

    def test_voxels_show_progress_and_what_each_model_says(self, training, monkeypatch, tmp_path):
        from flash_wtconv_jax.train import voxels

        def run_demo(out, task, *, voxel_size, seed, epochs, on_epoch):
            assert (task, voxel_size, seed, epochs) == ("rooms", 0.2, 3, 2)
            for name in voxels.NETWORKS:
                on_epoch(name, [1.0])
                on_epoch(name, [1.0, 0.5])
            (out / "metrics.json").touch()
            return {
                "networks": {name: {"miou": 0.75, "iou": {"floor": 0.9}} for name in ("a", "b")},
                "voxels": {"training": 23587, "held_out": 3},
                "voxel_size": "0.2 m",
                "seconds": 12.3,
            }

        monkeypatch.setattr(voxels, "run_demo", run_demo)
        options = ("--seed", 3, "--epochs", 2, "--voxel-size", 0.2)
        result = run("demo", "--task", "rooms", "--out", tmp_path, *options)
        assert result.exit_code == 0, result.output
        assert "2/2 epochs" in result.output and "loss 0.500" in result.output
        assert "a: mIoU 75.0% of held-out voxels (floor 90.0%)" in result.output
        assert "23,587 voxels of 0.2 m" in result.output
        assert str(tmp_path / "metrics.json") in result.output
        assert "predictions.png" not in result.output

    def test_a_missing_nilearn_is_named_with_its_extra(self, monkeypatch, fail, tmp_path):
        monkeypatch.setitem(sys.modules, "nilearn", None)
        message = fail("demo", "--task", "voxels", "--out", tmp_path)
        assert message.endswith(
            "nilearn is not installed: pip install 'flash-wtconv[voxels]' brings it"
        )

    def test_options_that_do_not_fit_the_task(self, training, fail, tmp_path):
        options = ("--voxel-size", "1", "--out", tmp_path / "demo")
        assert "--voxel-size belongs to --task voxels" in fail("demo", *options)
        assert "expected at least 0.02 m" in fail("demo", "--task", "rooms", "--voxel-size", "-1")

    def test_a_missing_torch_is_named_with_its_extra(self, monkeypatch, fail, tmp_path):
        pytest.importorskip("matplotlib")
        (tmp_path / "a.pth").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "torch", None)
        message = fail("erf", tmp_path / "a.pth", "--out", tmp_path / "erf.png")
        assert message.endswith("pip install 'flash-wtconv[torch]' brings it")


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch, fail, tmp_path):
    for name in list(sys.modules):
        if name.startswith(("flash_wtconv_jax.plots", "matplotlib.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(flash_wtconv_jax, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (("erf", tmp_path), ("bench", "wtconv"), ("bench", "wtconvnext")):
        message = fail(*command, "--out", tmp_path / "a")
        assert message.endswith("pip install 'flash-wtconv[plot]' brings it")
    # What has no pictures needs no matplotlib.
    report = {"benchmark": "host", "no_device_events": None}
    tell(report, Table("a"), {}, tmp_path)
    assert (tmp_path / "host.json").is_file()


def test_help_lists_the_names_of_shapes():
    for command, names in (
        (("bench", "wtconv"), [name for group in FOR_PLATFORM.values() for name in group]),
        (("bench", "conv2d"), SHAPES),
        (("bench", "depthwise"), [name for group in IMAGES.values() for name in group]),
        (("bench", "haar"), [name for group in LAYERS.values() for name in group]),
        (("bench", "sparse"), sparse.NAMES),
        (("tpu-report",), FOR_PLATFORM["tpu"]),
    ):
        shown = run(*command, "--help", env={"COLUMNS": "2000"}).output
        assert [name for name in names if name not in shown] == []


def test_every_mistake_is_drawn():
    plots = pytest.importorskip("flash_wtconv_jax.plots", exc_type=ImportError)
    labels = np.arange(60) % 10
    guesses = np.where(np.arange(60) < 40, (labels + 1) % 10, labels)
    figure = plots.predictions(np.ones((60, 8, 20)), labels, 0.5 * np.eye(10)[guesses] + 0.05)
    (axes,) = figure.axes
    titles = [text.get_text() for text in axes.texts]
    assert len(titles) == len(axes.images) == 40 and all(", is " in title for title in titles)
    assert figure.get_suptitle() == "40 of 60 held-out images read wrongly"


def test_figures_are_drawn_without_a_display_and_in_matplotlib_s_own_style(tmp_path):
    plots = pytest.importorskip("flash_wtconv_jax.plots", exc_type=ImportError)
    matplotlib = pytest.importorskip("matplotlib")
    training = pytest.importorskip("flash_wtconv_jax.train.digits", exc_type=ImportError)
    histories = {"one": [training.History([2.0, 1.0], [0.5, 1.0])]}
    probabilities = np.eye(3)[[0, 1, 1]]
    # Odd sizes: 7 x 5 splits into 4 x 3, and that into 2 x 2.
    cascade = [np.ones((2, 2, 1)), (np.ones((2, 2, 1)),) * 3, (np.ones((4, 3, 1)),) * 3]
    # TeX is asked for, and a font that nobody has; a title that is no formula.
    settings = {"text.usetex": True, "font.family": "no such font", "figure.dpi": 7}
    with matplotlib.rc_context(settings):
        figures = {
            "curve.png": plots.training_curve(histories),
            "predictions.svg": plots.predictions(np.ones((3, 8, 8)), np.arange(3), probabilities),
            "cascade.png": plots.wavelet_cascade(cascade, "$x_{$"),
        }
        for name, figure in figures.items():
            plots.save(figure, tmp_path / name)
            assert (tmp_path / name).stat().st_size > 1000
