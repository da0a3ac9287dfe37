"""CUDA sources compiled at first use through NVRTC: no toolkit, no C++ compiler.

Machine code is kept on disk by what it was made from, so a later process only reads it.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile

OPTIONS = {"std": "c++17"}


def compiled(source: str, macros: Mapping[str, object], arch: str) -> bytes:
    """Machine code of a CUDA source, from the disk if it was compiled before.

    Args:
        source: CUDA C++ that includes nothing.
        macros: Preprocessor definitions.
        arch: Architecture of the GPU, such as "sm_90".

    Returns:
        A cubin.

    Raises:
        RuntimeError: The source does not compile; holds the compiler's log.
    """
    path = cache_folder() / f"{_key(source, macros, arch)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = compile_source(source, macros, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        # A disk that cannot be written costs the next process a second, and this one nothing.
        pass
    return code


def compile_source(source: str, macros: Mapping[str, object], arch: str) -> bytes:
    """What `compiled` returns, compiled anew; runs without a GPU."""
    from cuda.core import Program, ProgramOptions

    define = [(name, str(value)) for name, value in macros.items()]
    options = ProgramOptions(arch=arch, define_macro=define, **OPTIONS)
    program = Program(source, "c++", options)
    try:
        return bytes(program.compile("cubin").code)
    except Exception as error:
        raise RuntimeError(f"NVRTC could not compile for {arch} with {define}:\n{error}") from error
    finally:
        program.close()


def cache_folder() -> Path:
    """The folder of the compiled kernels, of this user."""
    from platformdirs import user_cache_path

    return user_cache_path("flash_wtconv", appauthor=False) / "cuda"


def _key(source: str, macros: Mapping[str, object], arch: str) -> str:
    from cuda.bindings import nvrtc

    parts = (source, sorted(macros.items()), arch, OPTIONS, nvrtc.nvrtcVersion())
    return hashlib.sha256(repr(parts).encode()).hexdigest()
