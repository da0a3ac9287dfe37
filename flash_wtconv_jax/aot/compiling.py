"""Compilation for a TPU on a machine without one: starts the worker and hands it jobs."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from flash_wtconv_jax.aot.worker import DUMP
from pallas_kernels.common.types import Json

SECONDS = 180
"""Seconds after which a compilation is stopped: XLA would take 900 for some gradients."""


class Job(NamedTuple):
    """One program to compile for one chip.

    `program` ("module:function") is called with `arguments`, and returns the function to compile
    and the shapes of its arguments, as those of `programs` do. It is stopped after `limit` seconds.
    """

    program: str
    chip: str
    arguments: Json
    limit: float = SECONDS


class Result(NamedTuple):
    """The compiler's figures of a job.

    `error` is why it does not compile; everything else is then empty. `uncounted` is why its
    cycles cannot be counted although it compiles. `cycles` is the sum over `computations`, each
    with its name, cycles, VMEM, busy shares by unit, and loops. `estimated_cycles` is the estimate
    of XLA's cost model, which knows nothing of the inside of a Pallas kernel. `vmem_bytes` is the
    most that one computation takes, `vmem_capacity` the VMEM of the chip, `temporary_bytes` what
    the program takes of HBM beside its arguments and results.
    """

    error: str | None = None
    uncounted: str | None = None
    cycles: int | None = None
    estimated_cycles: int | None = None
    vmem_bytes: int | None = None
    vmem_capacity: int | None = None
    temporary_bytes: int | None = None
    seconds: float = 0.0
    computations: Sequence[Json] = ()


def run(jobs: Sequence[Job], on_result: Callable[[Result], None] = lambda _: None) -> list[Result]:
    """Compiles jobs one after another in one process, because starting it costs seconds.

    Args:
        jobs: The programs to compile.
        on_result: Told each result as it comes, for a progress bar.

    Returns:
        A result for each job, in their order.

    Raises:
        ModuleNotFoundError: libtpu, the compiler, is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("No module named 'libtpu'", name="libtpu")
    results: list[Result] = []
    while len(results) < len(jobs):
        results += _session(jobs[len(results) :], on_result)
    return results


def libtpu_version() -> str:
    """The version of the compiler."""
    return importlib.metadata.version("libtpu")


def _session(jobs: Sequence[Job], on_result: Callable[[Result], None]) -> list[Result]:
    """The results until the jobs or the worker end; a job that ends the worker gets its error."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="flash_wtconv_") as folder:
        log = Path(folder) / "log.txt"
        dump = Path(folder) / "dump"
        dump.mkdir()
        with log.open("w") as output:
            worker = _start(dump, output)
            try:
                for job in jobs:
                    answer = _ask(worker, job) or {"error": _death(worker.wait(), log)}
                    results.append(Result(**answer))
                    on_result(results[-1])
                    if worker.poll() is not None:
                        break
            finally:
                worker.kill()
                # Closes both pipes; one of a dead process may break once more.
                with suppress(BrokenPipeError, ValueError):
                    worker.communicate()
    return results


def _ask(worker: subprocess.Popen[str], job: Job) -> Json | None:
    """The worker's answer; None if the job ended the worker."""
    assert worker.stdin is not None and worker.stdout is not None
    start, late = time.monotonic(), threading.Timer(job.limit, worker.kill)
    late.start()
    try:
        worker.stdin.write(json.dumps(job._asdict()) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        return None
    finally:
        late.cancel()
    if not line and time.monotonic() - start >= job.limit:
        return {"error": f"not compiled within {job.limit:g} s"}
    return json.loads(line) if line else None


def _start(dump: Path, log: IO[str]) -> subprocess.Popen[str]:
    options = {
        "xla_jf_dump_to": dump,
        "xla_jf_dump_llo_text": "true",
        # All passes of a large program would be gigabytes.
        "xla_jf_dump_llo_pass_label_regex": "final_bundles|final_hlo|vmem_report",
        # Equal computations are otherwise dumped once, under the name of one of them.
        "xla_jf_hlo_deduplication_all_unique": "true",
    }
    environment = os.environ | {
        DUMP: str(dump),
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={value}" for name, value in options.items()),
        # The machine is a CPU's: no TPU is looked for, and another process may compile too.
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        # A program from a cache is not compiled, and nothing dumped.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
    )


def _death(status: int, log: Path) -> str:
    """The reason why a worker ended: its signal, or the last line that it wrote."""
    if status < 0:
        return f"the compiler died of {signal.Signals(-status).name}"
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"the compiler's process ended with status {status}: {last[:500]}"
