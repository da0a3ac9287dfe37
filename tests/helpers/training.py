"""A training of a few small images, in a process of its own that is killed, and its comparison.

`python tests/helpers/training.py 20` kills a training twenty times at random and compares what it
leaves with one that nothing stopped.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import numpy as np

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.train.images import reports, saving, settings

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


# What makes it cheap.
SMALL = {
    "model": {"options": {"depths": [1], "dims": [8], "levels": [1]}},
    "augment": {"erasing": 0.0, "mixup": 0.0},
    "run": {"accumulate": 1},
}
# Wide enough for its parameters to be split.
WIDE = {"model": {"options": {"dims": [64]}}}


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


def train_until(said: settings.Settings, out: Path, step: int, number: int, delay: float) -> None:
    """Trains in this process, and ends it: by a signal so long after a step, if it gets there."""
    from flash_wtconv_jax.train.images import trainer

    def on_progress(progress: trainer.Progress) -> None:
        if progress.step == step:
            threading.Thread(target=kill, daemon=True).start()

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), number)

    summary = trainer.train(said, out, resume=True, on_progress=on_progress)
    sys.exit(3 if summary["stopped"] else 0)


def seeing(devices: int) -> dict[str, str]:
    """The environment of a process that has so many devices: GPUs, or parts of a CPU."""
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        # Not found where this file is what Python runs.
        from helpers.processes import with_devices

        return with_devices(devices)
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices))),
        # Whoever starts the process may hold most of their memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Or losses differ by the rounding of products to TF32.
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }


# The process compiles programs as the suite does, and finds them compiled. It is forked before JAX
# starts in it, so that what takes longest, to import everything, is done once, and the collector
# of no process goes through it.
_AS_THE_SUITE = """
import gc, json, os, sys
sys.path.insert(0, sys.argv[1])
import helpers.quick
from pathlib import Path
# TensorBoard's writer would import it where it is, and nothing here needs it.
sys.modules["torch"] = None
import matplotlib.pyplot, tensorboardX
from flash_wtconv_jax.train.images import settings, trainer
from helpers.training import train_until
said = settings.resolved(settings.read(Path(sys.argv[2])))
gc.freeze()
statuses = []
for end in json.loads(sys.argv[4]):
    child = os.fork()
    if not child:
        train_until(said, Path(sys.argv[3]), *end)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


class End(NamedTuple):
    """A signal that ends a training, so many seconds after a step; step 0 never comes."""

    step: int = 0
    number: int = signal.SIGKILL
    delay: float = 0.0


def in_processes(
    said: settings.Settings,
    out: Path,
    ends: Sequence[End],
    environment: Mapping[str, str] | None = None,
) -> list[int]:
    """Trains in a process for each end, one after the other; returns their statuses."""
    file = out.with_suffix(".toml")
    file.write_text(settings.as_toml(said))
    arguments = [str(Path(__file__).parents[1]), str(file), str(out), json.dumps(ends)]
    command = [sys.executable, "-c", _AS_THE_SUITE, *arguments]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


# They are forked before JAX starts in them, too.
_TOGETHER = """
import gc, json, os, sys
sys.path.insert(0, sys.argv.pop(1))
import helpers.quick
sys.modules["torch"] = None
import matplotlib.pyplot, tensorboardX
import flash_wtconv_jax.train.images.trainer
from flash_wtconv_jax.cli import main
gc.freeze()
children = []
for rank in "01":
    children.append(os.fork())
    if not children[-1]:
        # Of several GPUs a process takes the one of its number.
        os.environ |= {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        main()
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


def in_two_processes(said: settings.Settings, out: Path) -> list[int]:
    """Trains by the command in two processes, as `mpirun` starts them; returns their statuses."""
    file = out.with_suffix(".toml")
    file.write_text(settings.as_toml(said))
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", _TOGETHER, tests, "train", str(file), "--distributed"]
    environment = seeing(2) | {
        # The number of the job tells the port.
        "OMPI_MCA_orte_hnp_uri": f"{os.getpid() * 4096}.0;tcp://127.0.0.1:40000",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    started = subprocess.Popen(
        [*command, "--out", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said_last = started.communicate(timeout=300)[0].splitlines()[-1]
    finally:
        # Neither waits for the other for ever.
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    return json.loads(said_last)


def killed_and_gone_on_with(
    said: settings.Settings, out: Path, mesh: Mapping[str, int], steps: int
) -> None:
    """Trains on a mesh of two devices, is killed after so many steps, and goes on with one."""
    spread = replace(said, run=replace(said.run, mesh=dict(mesh)))
    assert in_processes(spread, out, [End(steps)], seeing(2)) == [-signal.SIGKILL]
    assert steps_in(out), "no checkpoint was left to go on from"
    assert in_processes(said, out, [End()], seeing(1)) == [0]


def assert_same_images(one: Path, other: Path, rounding: float) -> None:
    """Two runs have seen the same images in the same order: each loss is the other's, rounded."""
    losses = [[row["loss"] for row in reports.rows(run, reports.STEPS)] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=rounding)


def main(kills: int) -> None:
    """Kills a training at random, lets it go on, and compares it with one that was not killed."""
    rng = random.Random(0)
    # Nothing here starts JAX before the comparison, so that its processes can be forked.
    forked = multiprocessing.get_context("fork")

    def trained(out: Path, step: int = 0, delay: float = 0.0) -> int | None:
        arguments = said, out, step, signal.SIGKILL, delay
        process = forked.Process(target=train_until, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    with TemporaryDirectory() as folder:
        here = Path(folder)
        # Variables of the environment JAX has read already.
        jax.config.update("jax_compilation_cache_dir", str(here / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
        write_images(here / "data")
        # Enough steps for all kills, each after a few that its process has done.
        more = {"run": {"epochs": 2 + kills // 2, "batch": 4, "save_every": 2}}
        said = settings.resolved(SAID, SMALL, {"data": {"folder": str(here / "data")}}, more)
        assert trained(here / "whole") == 0
        begun = time.monotonic()
        for _ in range(kills):
            last = max(map(int, steps_in(here / "killed")), default=0)
            step, delay = last + rng.randint(2, 7), rng.uniform(0, 0.1)
            status = trained(here / "killed", step, delay)
            assert status == -signal.SIGKILL, f"step {step}: the process ended with {status}"
            print(f"begun at step {last}, killed {delay:.3f} s after step {step}", flush=True)
        assert trained(here / "killed") == 0
        assert_same_run(here / "killed", here / "whole")
        print(
            f"{kills} kills, jax {jax.__version__}: losses and all state are bitwise those of a "
            f"run without ({time.monotonic() - begun:.0f} s)"
        )


def steps_in(run: Path) -> list[str]:
    """The steps of a run's whole checkpoints."""
    folder = run / saving.FOLDER
    return [one.name for one in folder.iterdir() if one.name.isdigit()] if folder.is_dir() else []


if __name__ == "__main__":
    main(int(sys.argv[1]))
