"""A training of a few small images, in a process of its own that is killed, and its comparison.

`python tests/helpers/training.py 20` kills a training twenty times at random and compares what it
leaves with one that nothing stopped.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

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


CHILD = """
import os, sys, threading, time
file, out, number, step, delay, tests = sys.argv[1:]
if tests:
    # It compiles programs as the suite does, and finds them compiled.
    sys.path.insert(0, tests)
    import conftest
from pathlib import Path
from flash_wtconv_jax.train.images import settings, trainer

def kill():
    time.sleep(float(delay))
    os.kill(os.getpid(), int(number))

def on_progress(progress):
    if progress.step >= int(step) > 0 and not begun:
        begun.append(threading.Thread(target=kill))
        begun[0].start()

begun = []
said = settings.resolved(settings.read(Path(file)))
summary = trainer.train(said, Path(out), resume=True, on_progress=on_progress)
sys.exit(3 if summary["stopped"] else 0)
"""


def in_a_process(
    said: settings.Settings,
    out: Path,
    step: int = 0,
    number: int = signal.SIGKILL,
    *,
    delay: float = 0.0,
    as_the_suite: bool = True,
) -> int:
    """Trains in a process that sends itself a signal after a step, 0 for none; returns its status.

    What is compared has to be compiled alike: as the suite compiles, or as everybody does.
    """
    file = out.with_suffix(".toml")
    file.write_text(settings.as_toml(said))
    tests = str(Path(__file__).parents[1]) if as_the_suite else ""
    arguments = [str(one) for one in (file, out, int(number), step, delay, tests)]
    return subprocess.run([sys.executable, "-c", CHILD, *arguments], timeout=600).returncode


def main(kills: int) -> None:
    """Kills a training at random, lets it go on, and compares it with one that was not killed."""
    rng = random.Random(0)
    with TemporaryDirectory() as folder:
        here = Path(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(here / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        write_images(here / "data")
        # Enough steps for all kills, each after a few that its process has done.
        more = {"run": {"epochs": 2 + 2 * kills, "save_every": 2}}
        said = settings.resolved(SAID, {"data": {"folder": str(here / "data")}}, more)
        assert in_a_process(said, here / "whole", as_the_suite=False) == 0
        done, begun = [], time.monotonic()
        for _ in range(kills):
            last = max(map(int, steps_in(here / "killed")), default=0)
            step, delay = last + rng.randint(1, 5), rng.uniform(0, 0.1)
            status = in_a_process(said, here / "killed", step, delay=delay, as_the_suite=False)
            assert status == -signal.SIGKILL, f"step {step}: the process ended with {status}"
            done.append(step)
            print(f"killed {delay:.2f} s after step {step}", flush=True)
        assert in_a_process(said, here / "killed", as_the_suite=False) == 0
        assert_same_run(here / "killed", here / "whole")
        print(
            f"{kills} kills after the steps {', '.join(map(str, done))}, jax {jax.__version__}: "
            "losses and all state are bitwise those of a run without "
            f"({time.monotonic() - begun:.0f} s)"
        )


def steps_in(run: Path) -> list[str]:
    """The steps of a run's whole checkpoints."""
    folder = run / saving.FOLDER
    return [one.name for one in folder.iterdir() if one.name.isdigit()] if folder.is_dir() else []


if __name__ == "__main__":
    main(int(sys.argv[1]))
