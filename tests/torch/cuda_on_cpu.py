"""Builds `wtconv.cu` for the CPU and launches its kernels on CPU tensors."""

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
SIGNATURES = {
    "forward": "ppppppppppiiiii",
    "low": "ppiiii",
    "weights": "pppiiiii",
}
POINTERS = {
    "forward": [*("const Scalar*", *["const float*"] * 8, "Scalar*"), *["int"] * 5],
    "low": ["const Scalar*", "float*", *["int"] * 4],
    "weights": ["const Scalar*", "const Scalar*", "float*", *["int"] * 5],
}


@cache
def built(source, kernel, macros, flags=("-O1",)):
    types = POINTERS[kernel]
    call = ", ".join(f"*({t}*)a[{i}]" for i, t in enumerate(types))
    text = (
        '#include "cuda_on_cpu.h"\n'
        + "".join(f"#define {name} {value}\n" for name, value in macros)
        + source
        + f"\nstatic void run(void** a) {{ wtconv_{kernel}({call}); }}\n"
        'extern "C" int launch(void** a, unsigned g, unsigned t, unsigned b, unsigned o) '
        "{ return cuda_on_cpu::launch(run, a, g, t, b, o); }\n"
    )
    folder = Path(tempfile.gettempdir()) / "h4cpu"
    folder.mkdir(exist_ok=True)
    header = (HERE / "cuda_on_cpu.h").read_text()
    name = hashlib.sha1((text + header + repr(flags)).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        (folder / f"{name}.cpp").write_text(text)
        command = ["g++", "-std=c++17", "-fPIC", "-shared", "-w", "-ffp-contract=off", *flags]
        command += ["-I", str(HERE), str(folder / f"{name}.cpp"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SyntaxError(done.stderr[:4000])
    return ctypes.CDLL(str(library)).launch


def launch(source, variant, grid, arguments, order=0, flags=("-O1",)):
    function = built(source, variant.kernel, tuple(variant.macros().items()), flags)
    keep = [
        ctypes.c_void_p(a.data_ptr() if a is not None else None)
        if a is None or torch.is_tensor(a)
        else ctypes.c_int(a)
        for a in arguments
    ]
    array = (ctypes.c_void_p * len(keep))(*[ctypes.addressof(value) for value in keep])
    if function(array, grid, variant.threads, variant.shared(), order):
        raise RuntimeError("not all threads of a block reached a barrier")
