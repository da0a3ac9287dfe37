"""A whole training on a few small images: it learns, is stopped, goes on bitwise, and is used."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("grain")

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

SAID = {
    "model": {
        "name": "ConvNeXt",
        "options": {
            "depths": [1, 1],
            "dims": [8, 16],
            "levels": [1, 1],
            "kernel_size": 3,
            "patch_size": 2,
            "drop_path": 0.2,
            "layer_scale": 1.0,
        },
    },
    "data": {"size": 8, "channels": 1, "mean": [0.5], "std": [0.25], "scale": [0.8, 1.0]},
    "augment": {"flip": 0.0, "erasing": 0.1, "mixup": 0.1},
    "optimizer": {"rate": 2e-2, "ema": 0.9, "clip": 1.0, "warmup": 0.5},
    "run": {"batch": 8, "accumulate": 2, "epochs": 2, "save_every": 3, "log_every": 1, "keep": 1},
}


def write_images(folder):
    """Forty images to learn from and twelve held out: the class is the bright third."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 12)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 90, (count, 9, 9, 1), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 3 * label : 3 * label + 3] += 120
        np.savez(folder / part, images=images, labels=labels, classes=["left", "middle", "right"])


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


class Stop(Exception):
    """Ends a training in the middle."""


def stopped_at(step):
    def on_progress(progress):
        if progress.step == step:
            raise Stop

    return on_progress


def figures(run):
    """Losses and scores of a run, without its times."""
    return [
        [
            {key: value for key, value in row.items() if key not in ("images_per_s", "waiting")}
            for row in rows
        ]
        for rows in (reports.rows(run, name) for name in (reports.STEPS, reports.EPOCHS))
    ]


def assert_same_run(one, other):
    """Losses and all that the last checkpoints hold are the same bits."""
    assert figures(one) == figures(other)
    with saving.saving(one, 1) as first, saving.saving(other, 1) as second:
        assert first.last == second.last
        for item in ("params", "ema", "memory"):
            trees = [
                checkpoints.restore(run / saving.FOLDER / str(first.last) / item)
                for run in (one, other)
            ]
            jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.wide
def test_it_learns_and_leaves_all_that_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == summary["of_steps"] == 10
    assert summary["scores"]["ema_top1"] > 0.9
    for name in trainer.FILES:
        assert (whole / name).exists(), name
    logged, evaluated = figures(whole)
    assert [row["step"] for row in logged] == list(range(1, 11))
    assert [row["step"] for row in evaluated] == [5, 10]
    assert any((whole / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_stopped_training_goes_on_bitwise(data, whole):
    out = data.parent / "stopped"
    with pytest.raises(Stop):
        trainer.train(resolved(data), out, on_progress=stopped_at(8))
    trainer.train(resolved(data), out, resume=True)
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_run_is_not_gone_on_with_by_accident_or_otherwise(data, whole):
    with pytest.raises(FileExistsError, match="holds a run; resume it"):
        trainer.train(resolved(data), whole)
    other = resolved(data, {"optimizer": {"rate": 0.5}})
    with pytest.raises(ValueError, match=r"other settings: optimizer\.rate is 0\.5, was 0\.02"):
        trainer.train(other, whole, resume=True)


@pytest.mark.slow
def test_checkpoints_are_read_like_any_others(data, whole):
    with saving.saving(whole, 1) as saver:
        best = whole / saving.FOLDER / str(saver.best)
    network = models.load_network(whole / "network")
    params = checkpoints.variables_of(network)["params"]
    for path in (best, best / "ema"):
        found = checkpoints.restore(path)["params"]
        jax.tree.map(np.testing.assert_array_equal, found, params)
    assert models.load_network(best).config == network.config
    trained = evaluation.load(whole)
    scores = evaluation.evaluate(trained, sources.opened(data, "val"), batch=5)
    rows = {row["step"]: row for row in reports.rows(whole, reports.EPOCHS)}
    assert scores["top1"] == rows[int(best.name)]["ema_top1"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_it(data, tmp_path):
    message = r"step \d: the loss is .*; no checkpoint yet\. Its images are listed in"
    with pytest.raises(ValueError, match=message):
        trainer.train(
            resolved(data, {"optimizer": {"rate": 1e38, "warmup": 1.0, "clip": 0.0}}), tmp_path
        )
    (listed,) = tmp_path.glob("batch_of_step_*.txt")
    assert len(listed.read_text().splitlines()) == 8


@pytest.mark.slow
def test_fine_tuning_begins_from_a_checkpoint_with_a_new_head(data, whole, tmp_path):
    said = {"model": {"name": "", "options": {}, "checkpoint": str(whole / "network")}}
    model = trainer.network(resolved(data, said), classes=7)
    begun = models.load_network(whole / "network")
    found, wanted = (checkpoints.variables_of(one)["params"] for one in (model, begun))
    assert found["head"]["fc"]["bias"].shape == (7,)
    for params in (found, wanted):
        params["head"].pop("fc")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


RUN = """
import sys
from pathlib import Path
from flash_wtconv_jax.train.images import settings, trainer
said = settings.read(Path(sys.argv[1]))
def on_progress(progress):
    print(progress.step, flush=True)
if __name__ == "__main__":
    summary = trainer.train(
        settings.resolved(said), Path(sys.argv[2]), resume=True, on_progress=on_progress
    )
    sys.exit(3 if summary["stopped"] else 0)
"""


def in_a_process(data, out, number=None, step=None):
    """Trains in a process of its own, and sends it a signal after a step; returns its status.

    All runs that are compared are in processes: the suite compiles programs in a way of its own.
    """
    file = data.parent / "settings.toml"
    file.write_text(settings.as_toml(resolved(data)))
    command = [sys.executable, "-c", RUN, file, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if number is not None and int(line) == step:
                process.send_signal(number)
                break
        process.stdout.read()
        return process.wait()


@pytest.mark.slow
def test_a_killed_training_goes_on_bitwise(data):
    out, whole = data.parent / "killed", data.parent / "not_killed"
    assert in_a_process(data, whole) == 0
    assert in_a_process(data, out, signal.SIGKILL, 7) == -signal.SIGKILL
    assert in_a_process(data, out) == 0
    assert_same_run(out, whole)


@pytest.mark.slow
def test_five_kills_and_a_request_to_stop_change_nothing(data):
    out, whole = data.parent / "killed_often", data.parent / "never_killed"
    assert in_a_process(data, whole) == 0
    for step in (2, 4, 5, 7, 8):
        assert in_a_process(data, out, signal.SIGKILL, step) == -signal.SIGKILL
    assert in_a_process(data, out, signal.SIGTERM, 9) in (0, 3)
    assert in_a_process(data, out) == 0
    assert_same_run(out, whole)


MESHES = """
import sys
import jax, numpy as np
from pathlib import Path
from flash_wtconv_jax.train.images import loading, settings, steps, trainer
said = settings.read(Path(sys.argv[1]))
found = []
for axes in ({"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "model": 2}):
    count = int(np.prod(list(axes.values())))
    jax_devices = jax.devices
    jax.devices = lambda *args: jax_devices(*args)[:count]
    wanted = settings.resolved(said, {"run": {"mesh": axes, "accumulate": 1}})
    run = trainer.prepared(wanted)
    program = steps.program(
        run.model, wanted, run.mesh, optimizer=run.optimizer, classes=len(run.train.classes)
    )
    jax.devices = jax_devices
    state = program.start()
    dataset = loading.training(run.train, wanted.data, batch=8, seed=0, steps=range(2))
    with loading.iterating(dataset) as batches:
        for arrays in batches:
            state, metrics = program.train(state, steps.on_devices(arrays, program.rows))
    found.append(jax.device_get((metrics, state.memory)))
for other in found[1:]:
    for one, two in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
        scale = np.abs(one).max() or 1.0
        assert np.abs(one - two).max() <= 1e-5 * max(scale, 1e-3), (one, two)
"""


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(data):
    file = data.parent / "meshes.toml"
    file.write_text(settings.as_toml(resolved(data)))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", MESHES, file], check=True, env=environment)


@pytest.mark.slow
def test_two_processes_train_as_one(data, whole, tmp_path):
    """Under the variables that `mpirun` sets."""
    file = tmp_path / "settings.toml"
    file.write_text(settings.as_toml(resolved(data, {"run": {"accumulate": 1}})))
    alone = tmp_path / "alone"
    trainer.train(resolved(data, {"run": {"accumulate": 1}}), alone)
    command = [
        sys.executable,
        "-c",
        "from flash_wtconv_jax.cli import main; main()",
        "train",
        str(file),
        "--distributed",
    ]
    processes = []
    for rank in (0, 1):
        environment = {
            **os.environ,
            "OMPI_MCA_orte_hnp_uri": "1234567.0;tcp://127.0.0.1:40000",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        }
        processes.append(
            subprocess.Popen([*command, "--out", str(tmp_path / "both")], env=environment)
        )
    assert [process.wait() for process in processes] == [0, 0]
    one, two = (
        [row["loss"] for row in reports.rows(run, reports.STEPS)]
        for run in (alone, tmp_path / "both")
    )
    np.testing.assert_allclose(one, two, rtol=1e-4)
