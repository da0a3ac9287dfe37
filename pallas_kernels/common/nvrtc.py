"""CUDA sources compiled at first use through NVRTC, without the CUDA toolkit or a C++ compiler.

What is compiled is cached on disk under a hash of everything it was compiled from, so that a later
process only reads it: a cubin for a GPU ("sm_90"), or PTX for all GPUs from one on ("compute_90").
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.common.files import replacing
from pallas_kernels.common.refusals import KernelError

_OPTIONS = ("--std=c++17",)


def compiled(source: str, macros: Mapping[str, object], arch: str) -> bytes:
    """The cubin or the PTX of a CUDA source, read from the disk if it was compiled before.

    Args:
        source: CUDA C++ that includes nothing.
        macros: Preprocessor definitions.
        arch: Architecture of the GPU, such as "sm_90", or a virtual one, such as "compute_90".

    Returns:
        A cubin, or PTX of a virtual architecture.

    Raises:
        KernelError: The source does not compile; the error holds the compiler's log.
    """
    path = (
        cache_folder() / f"{_key(source, macros, arch)}.{'ptx' if _is_virtual(arch) else 'cubin'}"
    )
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = compile_source(source, macros, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What cannot be read, a link perhaps, is not written through.
        path.unlink(missing_ok=True)
        with replacing(path, force=True) as temporary:
            temporary.write_bytes(code)
    except OSError:
        # Without a cache the next process compiles again, for a second; this one is unharmed.
        pass
    return code


def compile_source(source: str, macros: Mapping[str, object], arch: str) -> bytes:
    """The result of `compiled`, compiled anew; it takes the same arguments, and no GPU."""
    from cuda.bindings import nvrtc

    options = [*_OPTIONS, f"--gpu-architecture={arch}"]
    options += [f"--define-macro={name}={value}" for name, value in macros.items()]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(status):
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            reasons = log.rstrip(b"\0").decode(errors="replace")
            raise KernelError(f"NVRTC could not compile with {' '.join(options)}", reasons)
        if _is_virtual(arch):
            text = bytes(_checked(nvrtc.nvrtcGetPTXSize(program)))
            _checked(nvrtc.nvrtcGetPTX(program, text))
            return text.rstrip(b"\0")
        code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def version() -> str:
    """NVRTC's version, such as "13.0".

    Raises:
        ImportError: cuda-bindings is not installed.
        RuntimeError: It does not find NVRTC.
    """
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    _checked((status,))
    return f"{major}.{minor}"


def virtual_arch(capability: int, exact: bool = False) -> str:
    """The newest virtual architecture that NVRTC knows and a GPU understands.

    Args:
        capability: The GPU's compute capability times ten, such as 90.
        exact: Whether it is that of GPUs of this capability alone, which has more instructions.

    Returns:
        Its name, such as "compute_90".

    Raises:
        NotImplementedError: NVRTC knows newer GPUs alone.
    """
    from cuda.bindings import nvrtc

    if exact:
        return f"compute_{capability}a"
    known = _checked(nvrtc.nvrtcGetSupportedArchs())
    able = [number for number in known if number <= capability]
    if not able:
        raise NotImplementedError(
            f"NVRTC {version()} compiles for compute capability {min(known) / 10} and newer, this "
            f"GPU has {capability / 10}"
        )
    return f"compute_{max(able)}"


def _is_virtual(arch: str) -> bool:
    return arch.startswith("compute_")


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value that a call of NVRTC returned after its status.

    Raises:
        RuntimeError: The status is an error.
    """
    status, *values = answer
    if int(status):
        raise RuntimeError(f"NVRTC reports {status.name}")
    return values[0] if values else None


def cache_folder() -> Path:
    """The folder where what was compiled for this user is cached."""
    from platformdirs import user_cache_path

    return user_cache_path("flash_wtconv", appauthor=False) / "cuda"


def _key(source: str, macros: Mapping[str, object], arch: str) -> str:
    from cuda.bindings import nvrtc

    parts = (source, sorted(macros.items()), arch, _OPTIONS, nvrtc.nvrtcVersion())
    return hashlib.sha256(repr(parts).encode()).hexdigest()
