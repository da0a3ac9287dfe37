"""Compiles jobs with libtpu: `python -m flash_wtconv_jax.aot.worker`, a process of its own.

libtpu reads its options once, when it is loaded, and only one program may hold it unless told
otherwise; so the process that wants to know starts this one (`compiling.run`). It reads a job a
line from its standard input and writes a result a line to its standard output, as JSON.
"""

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from flash_wtconv_jax.aot import bundles
from flash_wtconv_jax.aot.chips import CHIPS
from pallas_kernels.common.types import Json

DUMP = "FLASH_WTCONV_TPU_DUMP"
"""The environment variable that names the folder of the compiler's dump."""

_ERROR_LENGTH = 500
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
_CASES = re.compile(r" conditional\(.*true_computation=(\S+), false_computation=(\S+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LESS = re.compile(r"ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT")
_CONSTANT = re.compile(r"%?([\w.-]+) = \S+ constant\((\d+)\)")


def main() -> None:
    """Compiles the jobs of the standard input until it ends."""
    # What libraries print goes elsewhere than the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(os.environ[DUMP])
    for line in sys.stdin:
        result = compile_job(json.loads(line), folder)
        answers.write(json.dumps(result) + "\n")
        answers.flush()


def compile_job(job: Json, folder: Path) -> Json:
    """Compiles one job and counts its cycles; the dump is read and removed.

    Args:
        job: The fields of a `compiling.Job`.
        folder: The folder that the compiler dumps into.

    Returns:
        The fields of a `compiling.Result`.
    """
    for path in folder.iterdir():
        path.unlink()
    start = time.perf_counter()
    try:
        compiled = _compile(job)
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": message[:_ERROR_LENGTH]}
    result: Json = {
        "seconds": time.perf_counter() - start,
        "estimated_cycles": estimated_cycles(compiled.as_text() or ""),
        "temporary_bytes": getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
    }
    try:
        return result | read_dump(folder, CHIPS[job["chip"]].delay_slots)
    except ValueError as error:
        return result | {"uncounted": str(error)}


def _compile(job: Json) -> jax.stages.Compiled:
    chip = CHIPS[job["chip"]]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    device: jax.Device = topology.devices[0]
    sharding = SingleDeviceSharding(device)
    module, _, name = job["program"].partition(":")
    function, shapes = getattr(importlib.import_module(module), name)(**job["arguments"])
    arguments = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )
    # Kernels ask the mesh of the context which chip they are for.
    kind = jax.sharding.AbstractDevice(device.device_kind, chip.cores, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def read_dump(folder: Path, delay_slots: int) -> Json:
    """Cycles, VMEM and slots of a compiled program.

    Args:
        folder: The compiler's dump of this program alone.
        delay_slots: Delay slots of the chip, see `bundles.count`.

    Returns:
        `cycles`, of all computations; `computations`, of each its name, cycles, VMEM and slots;
        `vmem_bytes`, the most that one of them takes, and `vmem_capacity`.

    Raises:
        ValueError: Something cannot be counted, see `bundles.count`.
    """
    used, capacity = _vmem(folder)
    texts, around = {}, ""
    for path in folder.glob("*-final_bundles.txt"):
        if "schedule-analysis" in path.name:
            continue
        text = path.read_text()
        name = bundles.name_of(text)
        if name is not None:
            texts[name] = text, _utilisation(path)
        elif "-TLP-" in path.name:
            around = text
    computations: list[Json] = []
    calls = bundles.called(around) if around else []
    if not calls:
        raise ValueError("the dump has no program that calls computations")
    for name in calls:
        if name not in texts:
            raise ValueError(f"{name} is called, but its bundles are not in the dump")
        counted = bundles.count(*texts[name], delay_slots)
        computations.append(
            {
                "name": name,
                "cycles": counted.cycles,
                "vmem_bytes": used.get(name, 0),
                "busy": {unit: round(share, 4) for unit, share in counted.busy.items()},
                "loops": [loop._asdict() for loop in counted.loops],
            }
        )
    return {
        "cycles": sum(c["cycles"] for c in computations),
        "computations": computations,
        "vmem_bytes": max((c["vmem_bytes"] for c in computations), default=0),
        "vmem_capacity": capacity,
    }


def _utilisation(path: Path) -> str:
    """The utilisation table of a computation, whose file differs by the number of the pass."""
    stem = re.sub(r"\d+-final_bundles\.txt$", "", path.name)
    rest = re.compile(re.escape(stem) + r"\d+-final_hlo-static-per-bundle-utilization\.txt")
    for other in path.parent.iterdir():
        if rest.fullmatch(other.name):
            return other.read_text()
    raise ValueError(f"no utilisation beside {path.name}")


def _vmem(folder: Path) -> tuple[dict[str, int], int]:
    """Bytes of VMEM by computation, and the capacity, from the data of the compiler's web page."""
    page = next(folder.glob("*-vmem_report.html"), None)
    if page is None:
        raise ValueError("the dump has no vmem_report.html")
    _, _, data = page.read_text().partition("const DATA =")
    report = json.JSONDecoder().raw_decode(data.strip())[0]
    sizes = {name: entry["total_size"] for name, entry in report["hlo_breakdowns"].items()}
    return sizes, report["global_info"]["vmem_capacity"]


def estimated_cycles(hlo: str) -> int | None:
    """The cycles that XLA's cost model estimates for a program, summed over its instructions.

    Args:
        hlo: The text of the compiled module.

    Returns:
        Cycles of the entry computation, loops times their trip counts, of branches the dearest;
        None if a trip count is not known.

    Example:
        >>> estimated_cycles('''
        ... ENTRY %main (x: f32[8]) -> f32[8] {
        ...   %f = f32[8] fusion(%x), backend_config={"estimated_cycles":"70"}
        ... }''')
        70
        >>> estimated_cycles('''
        ... %a (x: f32[8]) -> f32[8] {
        ...   %f = f32[8] fusion(%x), backend_config={"estimated_cycles":"30"}
        ... }
        ... %b (x: f32[8]) -> f32[8] {
        ...   %c = f32[8] copy(%x), backend_config={"estimated_cycles":"4"}
        ... }
        ... ENTRY %main (p: pred[], x: f32[8]) -> f32[8] {
        ...   %r = f32[8] conditional(%p, %x, %x), true_computation=%a, false_computation=%b
        ...   %s = f32[8] conditional(%i, %x, %x), branch_computations={%b, %b}, metadata={}
        ... }''')
        34
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return _estimate(entry, computations)


def _estimate(name: str, computations: dict[str, list[str]]) -> int | None:
    total = 0
    for line in computations.get(name, []):
        total += sum(map(int, _ESTIMATE.findall(line)))
        loop = _WHILE.search(line)
        if loop:
            known, body = _TRIPS.search(line), _estimate(loop[2], computations)
            trips = int(known[1]) if known else _counted(computations.get(loop[1], []))
            if trips is None or body is None:
                return None
            total += trips * body
        costs = [_estimate(branch, computations) for branch in _branches(line)]
        if None in costs:
            return None
        total += max((cost for cost in costs if cost is not None), default=0)
    return total


def _counted(condition: list[str]) -> int | None:
    """The trips of a loop that counts from 0 to a constant, as JAX's scans do; None of others.

    Of loops over large arrays XLA does not tell them.

    Example:
        >>> _counted(["%c = s32[]{:T(128)} constant(27)",
        ...           "ROOT %l = pred[] compare(%i, %c), direction=LT, metadata={}"])
        27
    """
    constants = {found[1]: int(found[2]) for line in condition if (found := _CONSTANT.search(line))}
    bounds = [less[1] for line in condition if (less := _LESS.search(line))]
    return constants.get(bounds[0]) if bounds else None


def _branches(line: str) -> list[str]:
    """The computations of which a conditional runs one, none of another instruction."""
    several, two = _BRANCHES.search(line), _CASES.search(line)
    names = several[1].split(",") if several else two.groups() if two else ()
    return [name.strip(" %,") for name in names]


if __name__ == "__main__":
    main()
