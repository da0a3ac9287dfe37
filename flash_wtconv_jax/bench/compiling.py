"""`flash-wtconv bench compile`: what the first call of a layer and of a network takes.

Each program is made in a process of its own, so that nothing of it, nor of JAX, is cached; a
compilation cache on disk is turned off. Importing packages and starting the device is not counted.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import TYPE_CHECKING

from pallas_kernels.common.types import Json, Tree

if TYPE_CHECKING:
    import jax

LAYERS = ("layer, 16 bits", "layer, float32")
NETWORKS = {"WTConvNeXt-T inference": "inference", "WTConvNeXt-T training step": "training"}
PROGRAMS = (*LAYERS, *NETWORKS)
"""Forward and backward pass of a wavelet convolution by dtype, and the network's two steps."""

CONTENDERS = ("flash", "plain jax")
STEPS = ("trace", "lower", "compile", "run")
"""The steps of a first call, whose seconds are told apart."""

_SHAPE = {"cpu": (2, 64, 64, 32), "gpu": (128, 56, 56, 96), "tpu": (128, 56, 56, 96)}
_LEVELS, _TAPS = 3, 5


def run(
    programs: Sequence[str],
    progress: Callable[[str, int], Callable[[], None]],
    platform: str | None = None,
) -> Json:
    """Times the first call of programs, each in a process of its own.

    Args:
        programs: Some of `PROGRAMS`.
        progress: Told a label and a number of steps, returns what to call after each step.
        platform: "cpu", "gpu" or "tpu"; None is JAX's default.

    Returns:
        A JSON-able report: device, versions, date, and a row for each program and contender with
        the seconds of each of `STEPS` and of `all`, and `speedup`, those of plain JAX over its own.

    Raises:
        ValueError: An unknown program.
        RuntimeError: A program fails; says why.
    """
    if unknown := sorted(set(programs) - set(PROGRAMS)):
        raise ValueError(f"program: {unknown} is not one of {list(PROGRAMS)}")
    rows: list[Json] = []
    about: Json = {}
    for program in programs:
        step = progress(program, len(CONTENDERS))
        each = []
        for contender in CONTENDERS:
            found = _in_a_process(program, contender, platform)
            about = found["about"]
            each.append({"program": program, "contender": contender, **found["seconds"]})
            step()
        plain = each[-1]["all"]
        rows += [row | {"speedup": plain / row["all"]} for row in each]
    return {
        "benchmark": "compile",
        "date": date.today().isoformat(),
        "clock": "host",
        "no_device_events": None,
        "rows": rows,
        **about,
    }


def _in_a_process(program: str, contender: str, platform: str | None) -> Json:
    """Returns what `first_call` finds in a process that has nothing cached."""
    command = [sys.executable, "-m", __name__, program, contender, platform or ""]
    cacheless = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=cacheless, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{program} by {contender} fails: {last}")
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def first_call(program: str, contender: str) -> dict[str, float]:
    """The seconds of each of `STEPS` of a first call, and of `all`, in this process.

    Args:
        program: One of `PROGRAMS`.
        contender: One of `CONTENDERS`.

    Example:
        >>> sorted(first_call("layer, float32", "flash"))
        ['all', 'compile', 'lower', 'run', 'trace']
    """
    import jax

    if contender != CONTENDERS[0]:
        _take_plain_jax_alone()
    function, arguments = _made(program, contender)
    jax.block_until_ready(arguments)
    seconds = {}

    def timed(step: str, call: Callable[[], Tree]) -> Tree:
        start = time.perf_counter()
        found = call()
        seconds[step] = time.perf_counter() - start
        return found

    traced = timed("trace", lambda: jax.jit(function).trace(*arguments))
    lowered = timed("lower", traced.lower)
    compiled = timed("compile", lowered.compile)
    timed("run", lambda: jax.block_until_ready(compiled(*arguments)))
    return seconds | {"all": sum(seconds.values())}


def _take_plain_jax_alone() -> None:
    """Makes `implementation=None` mean plain JAX, of every operator and direction."""
    from pallas_kernels import dispatch

    for operator in dispatch.operators():
        for direction in operator.directions:
            os.environ[f"FLASH_WTCONV_{operator.name}_{direction}".upper()] = "xla"


def _made(program: str, contender: str) -> tuple[Callable[..., Tree], tuple[Tree, ...]]:
    """The function of a program, and arguments."""
    if program not in LAYERS:
        from flash_wtconv_jax import models
        from flash_wtconv_jax.bench import wtconvnext

        network = wtconvnext.Network(models.wtconvnext_tiny, *wtconvnext.sizes())
        return network.function(NETWORKS[program])
    return _layer("bfloat16" if program == LAYERS[0] else "float32", contender)


def _layer(dtype: str, contender: str) -> tuple[Callable[..., Tree], tuple[Tree, ...]]:
    """Forward and backward pass of one wavelet convolution."""
    import jax

    from pallas_kernels.common.device import platform
    from pallas_kernels.wtconv import baseline_jax, wtconv2d

    shape = _SHAPE[platform()]
    channels = shape[-1]
    sizes: dict[str, tuple[int, ...]] = {"base_kernel": (_TAPS, _TAPS, 1, channels)}
    sizes |= dict.fromkeys(("base_bias", "base_scale"), (channels,))
    for level in range(_LEVELS):
        sizes[f"wavelet_kernel_{level}"] = _TAPS, _TAPS, 4, channels
        sizes[f"wavelet_scale_{level}"] = 4, channels
    keys = jax.random.split(jax.random.key(0), len(sizes) + 2)
    arrays = [
        jax.random.normal(key, size, dtype)
        for key, size in zip(keys, [*sizes.values(), shape, shape], strict=True)
    ]
    params = dict(zip(sizes, arrays, strict=False))
    layer = wtconv2d if contender == CONTENDERS[0] else baseline_jax.wtconv

    def both(x: "jax.Array", params: Tree, dy: "jax.Array") -> Tree:
        y, pullback = jax.vjp(layer, x, params)
        return y, pullback(dy)

    return both, (arrays[-2], params, arrays[-1])


def _main(program: str, contender: str, platform: str) -> None:
    """Prints what the first call of a program takes, as JSON."""
    import jax

    from flash_wtconv_jax import environment
    from flash_wtconv_jax.bench import devices

    with jax.default_device(devices.first(platform or None)):
        about = {"device": environment.device(), "versions": environment.versions()}
        print(json.dumps({"seconds": first_call(program, contender), "about": about}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
