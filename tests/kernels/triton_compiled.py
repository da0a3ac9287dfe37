"""Compiles the Triton kernels of WTConv for several GPUs and prints what each takes, as JSON.

A process of its own, because Triton's interpreter, which the tests use, cannot be turned off.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.wtconv import triton_kernels

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BLOCK = {"P": 4, "BC": 32, "X_W": 96, "X_C": 1}
BOTH = BLOCK | {"Y_W": 96, "Y_C": 1, "K": 5}
FLAGS = {"BELOW": True, "BASE": True, "BIAS": True, "INNER": True}
CONSTANTS = {
    "low_bands": BLOCK | {"LEVELS": 3},
    "level_forward": BOTH | FLAGS | {"C": 96, "C_TAPS": 96, "TW": 4},
    "base_weights": BOTH | {"TURNS": 2, "TW": 8, "R": 14},
    "level_weights": BOTH | {"FIRST": 0, "BANDS": 4, "TURNS": 2, "TW": 2, "R": 14},
}
IMAGES = ("x", "below", "y", "dy", "low1", "low2", "low3")
TAPS = ("taps", "base", "bias", "sums")


def compiled(name, target, dtype):
    kernel, constants = getattr(triton_kernels, name), CONSTANTS[name]
    types = dict.fromkeys(IMAGES, f"*{dtype}") | dict.fromkeys(TAPS, "*fp32")
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": 4})


def resources(binary):
    """Registers of a thread, and what does not fit in them: bytes, on AMD registers."""
    if "amdgcn" in binary.asm:
        code = binary.asm["amdgcn"]
        return [int(re.search(rf"\.vgpr_{n}:\s*(\d+)", code)[1]) for n in ("count", "spill_count")]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return [int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", report.stdout).groups()]


if __name__ == "__main__":
    found = {
        f"{name} {target} {dtype}": resources(compiled(name, target, dtype))
        for name in CONSTANTS
        for target, dtype in zip(TARGETS, ("fp32", "fp16", "bf16", "fp32"), strict=True)
    }
    json.dump(found, sys.stdout)
