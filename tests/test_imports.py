"""Who may import whom, read off the sources; and what an import loads, in a fresh interpreter."""

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "pallas_kernels": ("flax", "torch", "flash_wtconv_jax", "torch_bridge"),
    "flash_wtconv_jax": ("torch_bridge",),
    "torch_bridge": (),
}
"""Packages that no module of a package imports, inside a function or for types either."""


def imports(file):
    """Names that a source imports, anywhere in it: modules, and what may be modules in them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            for name in node.names:
                inside = f"{node.module}.{name.name}"
                yield inside if inside in MODULES else node.module


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in FORBIDDEN
    for file in (ROOT / package).rglob("*.py")
}


@cache
def imported():
    """The names that each module imports, read once by whoever runs these tests."""
    return {name: set(imports(file)) for name, file in MODULES.items()}


def test_no_package_imports_what_stands_above_it():
    above = [
        (module, name)
        for module, names in imported().items()
        for name in names
        if name.partition(".")[0] in FORBIDDEN[module.partition(".")[0]]
    ]
    assert above == []


def test_the_torch_bridge_imports_what_contributing_allows():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"`torch_bridge/` may import[^\n]*:\n\n((?:    .*\n)+)", text)
    allowed = block.split()
    others = [
        (module, name)
        for module, names in imported().items()
        for name in names
        if module.startswith("torch_bridge")
        and name.startswith(("pallas_kernels", "flash_wtconv_jax"))
        and not any(fnmatchcase(name, pattern) for pattern in allowed)
    ]
    assert others == []


def room(module):
    """`flash_wtconv_jax.linen` of `flash_wtconv_jax.linen.conv2d`."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("unit", [str, room])
def test_no_circle_of_imports(unit):
    """Rooms of `pallas_kernels` meet: `common` measures by what `dispatch` defines."""
    graph = {}
    for module, names in imported().items():
        if unit is str or module.startswith(("flash_wtconv_jax.", "torch_bridge.")):
            own = graph.setdefault(unit(module), set())
            own |= {unit(name) for name in names & MODULES.keys()} - {unit(module)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# The packages whose modules have another name, and what JAX brings of its own version.
BROUGHT_BY = {
    "PIL": "Pillow",
    "absl": "absl-py",
    "cuda": "cuda-bindings",
    "google": "protobuf",
    "jaxlib": "jax",
    "orbax": "orbax-checkpoint",
    "pywt": "PyWavelets",
    "sklearn": "scikit-learn",
}
# Other people's kernels and networks, compared with or registered with where a user has them.
MET = {"spconv_triton", "timm"}


def undeclared(project, names):
    """The modules among `names` that neither Python nor a requirement of users brings."""
    optional = project["optional-dependencies"]
    brought = {*sys.stdlib_module_names, *FORBIDDEN, *MET}
    for one in [*project["dependencies"], *(line for name in optional for line in optional[name])]:
        brought.add(re.match(r"[\w-]+", one)[0].lower().replace("-", "_"))
    heads = {name.partition(".")[0] for name in names}
    return {
        head
        for head in heads - brought
        if BROUGHT_BY.get(head, head).lower().replace("-", "_") not in brought
    }


def test_what_is_imported_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in ("audit", "docs", "release", "test", "test-core", "test-jax"):  # Developers' own.
        del project["optional-dependencies"][extra]
    assert undeclared(project, set().union(*imported().values())) == set()
    assert undeclared(project, {"PIL.Image", "six", "json", "torch.nn", "pytest"}) == {
        "six",
        "pytest",
    }


WITHOUT_JAX = [
    "pallas_kernels",
    "pallas_kernels.oracle",
    "pallas_kernels.dispatch",
    "pallas_kernels.conv2d",
    "pallas_kernels.conv2d.cases",
    "pallas_kernels.conv2d.problem",
    "pallas_kernels.conv2d.shapes",
    "pallas_kernels.haar",
    "pallas_kernels.haar.cases",
    "pallas_kernels.haar.filters",
    "pallas_kernels.haar.problem",
    "pallas_kernels.haar.shapes",
    "pallas_kernels.sparse",
    "pallas_kernels.sparse.algorithms",
    "pallas_kernels.sparse.cases",
    "pallas_kernels.sparse.checks",
    "pallas_kernels.sparse.depthwise.cases",
    "pallas_kernels.sparse.depthwise.problem",
    "pallas_kernels.sparse.depthwise.shapes",
    "pallas_kernels.sparse.problem",
    "pallas_kernels.sparse.shapes",
    "pallas_kernels.stylize",
    "pallas_kernels.stylize.cases",
    "pallas_kernels.stylize.problem",
    "pallas_kernels.stylize.shapes",
    "pallas_kernels.common.cuda",
    "pallas_kernels.common.deprecation",
    "pallas_kernels.common.files",
    "pallas_kernels.common.integers",
    "pallas_kernels.common.nvrtc",
    "pallas_kernels.common.on_cpu.cuda",
    "pallas_kernels.common.refusals",
    "pallas_kernels.common.tiles",
    "pallas_kernels.common.triton",
    "pallas_kernels.common.versions",
    "pallas_kernels.wtconv",
    "pallas_kernels.wtconv.cases",
    "pallas_kernels.depthwise.cuda_launches",
    "pallas_kernels.wtconv.cuda_launches",
    "pallas_kernels.common.conformance",
    "pallas_kernels.wtconv.problem",
    "pallas_kernels.wtconv.shapes",
    "torch_bridge",
    "torch_bridge.contender",
    "flash_wtconv_jax",
    "flash_wtconv_jax.cli",
]

BLOCKED = """
import importlib, sys
for name in {blocked}:
    sys.modules[name] = None
for name in {names}:
    importlib.import_module(name)
"""


def run(code):
    """Runs code with warnings as errors; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_imports_without_jax_and_without_torch():
    assert run(BLOCKED.format(blocked=["jax", "jaxlib", "flax", "torch"], names=WITHOUT_JAX)) == ""


def test_the_torch_bridge_needs_no_jax():
    pytest.importorskip("torch", reason="torch is not installed")
    rooms = ["runtime.measuring", "wtconv.ops", "wtconv.triton", "wtconv.cuda", "check", "bench"]
    rooms += ["sparse.api", "sparse.triton", "sparse.depthwise.triton", "sparse.pooling"]
    rooms += ["stylize.layers", "stylize.triton", "depthwise.layers", "depthwise.cuda"]
    names = [f"torch_bridge.{name}" for name in rooms]
    code = BLOCKED.format(blocked=["jax", "jaxlib", "flax"], names=names)
    code += "import torch, torch_bridge\n"
    # PyTorch's compiler takes a second, and is for who compiles.
    code += "print('torch._dynamo' in sys.modules)\n"
    # Measuring needs none either: a stand-in for `cuda` makes it a choice. That it is slow is said.
    code += "import logging\nlogging.disable(logging.WARNING)\n"
    code += "from pallas_kernels.dispatch import cache\n"
    code += "from torch_bridge.wtconv import eager\n"
    code += "store = cache.Cache(None)\ncache.user_cache = lambda: store\n"
    code += "eager.unavailable = lambda platform: None\n"
    code += "sys.modules['torch_bridge.wtconv.cuda'] = eager\n"
    code += "names = ['cuda', 'eager']\n"
    code += "layer = torch_bridge.WTConv2d(2, 2, device='cpu', implementation=names)\n"
    code += "print(layer(torch.ones(1, 2, 5, 5)).shape, len(store.entries(*store.kinds())))\n"
    code += "voxels = torch_bridge.sparse.from_coords([[0, 1], [0, 2]], torch.ones(2, 1))\n"
    code += "weight = torch.ones(3, 1, 1)\n"
    code += "print(torch_bridge.spatially_sparse_conv(voxels, weight, 3).features.tolist())\n"
    code += "import pallas_kernels.oracle, flash_wtconv_jax.checkpoints as checkpoints\n"
    code += "checkpoints.from_torch(torch_bridge.WTConv2d(2, 2, device='cpu').state_dict())\n"
    assert run(code) == "False\ntorch.Size([1, 2, 5, 5]) 2\n[[2.0], [2.0]]\n"


def test_constants_are_marked_as_pytorch_does():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_bridge.runtime.calls import constant

    ours, theirs = constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}


def test_the_jax_side_needs_no_torch_and_starts_no_backend():
    names = ["flash_wtconv_jax.nnx", "flash_wtconv_jax.linen", "flash_wtconv_jax.models"]
    names += [
        "flash_wtconv_jax.checkpoints",
        "flash_wtconv_jax.surgery",
        "pallas_kernels.wtconv.api",
    ]
    code = BLOCKED.format(blocked=["torch", "matplotlib", "sklearn"], names=names)
    code += "print('matplotlib.pyplot' in sys.modules)\n"
    # Nor does a layer start a backend, which claims a GPU's memory and forbids
    # `jax.distributed.initialize` afterwards.
    code += "from flash_wtconv_jax import WTConv2d\n"
    code += "from pallas_kernels import haar, wtconv\n"
    code += "haar.dwt2, wtconv.wtconv2d\n"
    code += "from jax._src import xla_bridge\n"
    code += "print(xla_bridge.backends_are_initialized())\n"
    assert run(code) == "False\nFalse\n"


HEAVY = {"flax", "jax", "jaxlib", "matplotlib", "optax", "orbax", "sklearn", "torch"}
SHOW_HELP = """
from flash_wtconv_jax.cli import main
sys.argv = ["flash-wtconv", "--help"]
try:
    main()
except SystemExit as stopped:
    assert stopped.code == 0
"""


# The most modules that each may load, what the ones before have loaded left out. Python's own and
# NumPy's differ between versions: what is kept away are rooms and packages, which have hundreds.
CHEAP = {
    "import pallas_kernels": 20,
    "import flash_wtconv_jax": 60,
    "import torch_bridge": 20,
    SHOW_HELP: 500,
}


def newly_loaded(codes):
    """The modules that each of several pieces of code loads, in one process."""
    code = "import sys\n"
    for one in codes:
        code += f"before = set(sys.modules)\n{one}\n"
        code += "print('\\nloaded', *set(sys.modules) - before)\n"
    return [line.split()[1:] for line in run(code).splitlines() if line.startswith("loaded ")]


def test_what_is_cheap_loads_little_and_nothing_heavy():
    *found, planted = newly_loaded([*CHEAP, "import sqlite3"])
    for names, (code, most) in zip(found, CHEAP.items(), strict=True):
        assert len(names) <= most, code
        assert HEAVY.isdisjoint(name.partition(".")[0] for name in names), code
    assert "flash_wtconv_jax" in found[1] and "flash_wtconv_jax.cli" in found[3]
    assert "sqlite3.dbapi2" in planted
