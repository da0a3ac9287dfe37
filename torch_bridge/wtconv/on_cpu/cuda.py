"""Runs `cuda_kernels.cu` on the CPU, as the implementation "cuda" launches it."""

import ctypes
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import patch

from torch import Tensor

from torch_bridge.wtconv import cuda as cuda_launch
from torch_bridge.wtconv.cuda import Device, Variant

HOPPER = Device(shared=232448, multiprocessors=2)
"""The shared memory of an H100 or H200, and few multiprocessors."""

_HEADER = Path(__file__).with_name("cuda.h")
_COMMAND = ("g++", "-std=c++17", "-shared", "-fPIC", "-w", "-O1", "-ffp-contract=off")
_PARAMETERS = {
    "forward": ["const Scalar*", *["const float*"] * 8, "Scalar*", *["int"] * 5],
    "low": ["const Scalar*", "float*", *["int"] * 4],
    "weights": ["const Scalar*", "const Scalar*", "float*", *["int"] * 5],
}
"""Types of the arguments of each kernel."""


def unavailable() -> str | None:
    """The reason why kernels cannot run here: they need g++ and the contexts of Linux."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    return None if shutil.which("g++") else "needs the compiler g++"


@contextmanager
def emulated(device: Device = HOPPER, **options: Any) -> Iterator["Launcher"]:
    """Lets the implementation "cuda" take tensors of the CPU, and launch there.

    Args:
        device: The properties of a GPU that variants are chosen by.
        **options: Arguments of `Launcher`.

    Yields:
        The launcher.

    Raises:
        RuntimeError: From a launch whose source does not compile, or in which not all threads of a
            block reach a barrier.

    Example:
        >>> import torch, torch_bridge
        >>> layer = torch_bridge.WTConv2d(1, 1, 3, device="cpu", implementation="cuda")
        >>> if unavailable() is None:
        ...     with emulated():
        ...         assert layer(torch.ones(1, 1, 4, 4)).isfinite().all()
    """
    with TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder), **options)
        with patch.multiple(
            cuda_launch,
            unavailable=lambda platform: None,
            device_of=lambda _: device,
            launch=launcher.launch,
        ):
            yield launcher


class Launcher:
    """Builds and launches kernels on the CPU.

    Args:
        folder: The folder that libraries are built in.
        source: CUDA C++; None is that of the package.
        order: Order of the threads of a block between two barriers: 0 as they are numbered, 1 in
            reverse, any other number at random, always the same.
        flags: More of the compiler's options.
    """

    def __init__(
        self,
        folder: Path,
        source: str | None = None,
        order: int = 0,
        flags: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._source = cuda_launch.SOURCE.read_text() if source is None else source
        self._flags = flags
        self.order = order

    def launch(
        self, variant: Variant, blocks: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        """Launches a kernel on the CPU, with the arguments of `cuda_launch.launch`.

        Outputs are filled with NaN before, so that elements which are not written show.
        """
        function = self._built(variant)
        _poison(variant, arguments)
        values = [
            ctypes.c_int(a)
            if isinstance(a, int)
            else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        ]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        if function(addresses, blocks, variant.threads, variant.shared(), self.order):
            raise RuntimeError("not all threads of a block reached a barrier")

    def _built(self, variant: Variant) -> Callable[..., int]:
        """The library's function for one variant, built if it is not there."""
        macros = "".join(f"#define {name} {value}\n" for name, value in variant.macros().items())
        parameters = _PARAMETERS[variant.kernel]
        call = ", ".join(f"*({kind}*)values[{i}]" for i, kind in enumerate(parameters))
        text = (
            f'#include "{_HEADER}"\n{macros}{self._source}\n'
            f"static void run(void** values) {{ wtconv_{variant.kernel}({call}); }}\n"
            'extern "C" int launch(void** values, unsigned blocks, unsigned threads,\n'
            "                      unsigned bytes, unsigned order) {\n"
            "  return cuda_on_cpu::launch(run, values, blocks, threads, bytes, order);\n}\n"
        )
        name = hashlib.sha256(repr((text, self._flags)).encode()).hexdigest()[:16]
        library = self._folder / f"{name}.so"
        if not library.exists():
            source = library.with_suffix(".cpp")
            source.write_text(text)
            command = [*_COMMAND, *self._flags, str(source), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return ctypes.CDLL(str(library)).launch


def _poison(variant: Variant, arguments: Sequence[Tensor | int | None]) -> None:
    parameters = _PARAMETERS[variant.kernel]
    for kind, argument in zip(parameters, arguments, strict=True):
        if kind in ("float*", "Scalar*"):
            cast(Tensor, argument).fill_(float("nan"))
