"""Figures of a run while it goes on: lines of CSV, TensorBoard's events, curves, a summary."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax

from pallas_kernels.common.files import replacing
from pallas_kernels.common.types import Json

STEPS = "steps.csv"
EPOCHS = "epochs.csv"
"""The files of a run: one has a line every so many steps, one a line an evaluation. Figures are
written so that they read back as the same."""
SCORES = {
    False: ("loss", "top1", "top5", "ema_loss", "ema_top1", "ema_top5"),
    True: ("loss", "pixels", "miou", "ema_loss", "ema_pixels", "ema_miou"),
}
"""The scores in `epochs.csv` by whether they are of pixels."""
_STEP_COLUMNS = ("step", "epoch", "loss", "norm", "rate", "images_per_s", "waiting", "broken")


class Reporter:
    """Writes the figures of a run to files that only grow; see `reporting`.

    Args:
        files: Open files by name.
        columns: The columns of each.
        events: TensorBoard's writer.
    """

    def __init__(
        self, files: Mapping[str, TextIO], columns: Mapping[str, Sequence[str]], events: Any
    ) -> None:
        self.files, self.columns, self.events = files, columns, events

    def add(self, name: str, row: Mapping[str, float]) -> None:
        """Adds a line to a file, and the same figures to TensorBoard's events."""
        columns = self.columns[name]
        csv.writer(self.files[name]).writerow([row.get(column, "") for column in columns])
        # A run that is killed has told all that it did.
        self.files[name].flush()
        group = "train" if name == STEPS else "val"
        for column in columns[1:]:
            if column in row:
                self.events.add_scalar(f"{group}/{column}", row[column], int(row["step"]))
        self.events.flush()


@contextmanager
def reporting(run: Path, begun: int, *, of_pixels: bool) -> Iterator[Reporter]:
    """Yields the reporter of a run; lines of steps that are done again are taken out.

    Args:
        run: The folder of the run.
        begun: Steps done before: later ones were lost with the process that did them.
        of_pixels: Whether the network tells pixels apart.
    """
    from tensorboardX import SummaryWriter

    named = {STEPS: _STEP_COLUMNS, EPOCHS: ("step", "epoch", *SCORES[of_pixels])}
    for name, columns in named.items():
        kept = [row for row in rows(run, name) if row["step"] <= begun]
        with (
            replacing(run / name, force=True) as temporary,
            temporary.open("w", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([row.get(column, "") for column in columns] for row in kept)
    events = SummaryWriter(str(run / "tensorboard"), purge_step=begun + 1 if begun else None)
    files = {name: (run / name).open("a", newline="") for name in named}
    try:
        yield Reporter(files, named, events)
    finally:
        for file in files.values():
            file.close()
        events.close()


def rows(run: Path, name: str) -> list[dict[str, float]]:
    """The lines of a file of a run, none where there is no file; a cut last line is left out."""
    if not (run / name).is_file():
        return []
    with (run / name).open(newline="") as file:
        found = []
        for row in csv.DictReader(file):
            try:
                found.append({key: _number(text) for key, text in row.items() if text})
            except (TypeError, ValueError):
                break
    return [row for row in found if "step" in row]


def draw_curves(run: Path) -> None:
    """Draws loss, error and learning rate of a run into its `curves.png`."""
    from flash_wtconv_jax import plots

    picture = plots.png(plots.run_curves(rows(run, STEPS), rows(run, EPOCHS)))
    with replacing(run / "curves.png", force=True) as temporary:
        temporary.write_bytes(picture)


def write_summary(run: Path, summary: Json) -> None:
    """Writes the summary of a run, `summary.json`."""
    with replacing(run / "summary.json", force=True) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")


def peak_memory() -> dict[str, int]:
    """The most bytes in use so far: of each device that tells, and of this process."""
    peaks = {}
    for device in jax.local_devices():
        told = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if told is not None:
            peaks[str(device)] = int(told)
    if sys.platform == "win32":
        return peaks
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kilobytes.
    return {**peaks, "host": most if sys.platform == "darwin" else most * 1024}


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
