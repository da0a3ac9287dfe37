"""Registers and stack of machine code for NVIDIA GPUs, by a tool that comes with Triton."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def usage(cubin):
    """Registers of a thread, and bytes of what does not fit in them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout).groups()
    return int(registers), int(stack)
