"""`python -m torch_bridge.coreml check`: packages of a layer, against the oracle."""

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from flash_wtconv_jax.cli.check import AsJson, show
from pallas_kernels.common.conformance import Backend, Results, run
from pallas_kernels.common.types import Json
from pallas_kernels.haar.filters import IS_HAAR
from pallas_kernels.oracle import wavedec, waverec
from pallas_kernels.wtconv.cases import CASES, Case
from torch_bridge.check import layer_results
from torch_bridge.coreml import layer, package
from torch_bridge.coreml.evaluator import Package
from torch_bridge.coreml.program import Array
from torch_bridge.coreml.tools import coremltools

_PRECISIONS = {"float32": "fp32", "float16": "fp16"}


class Forward(NamedTuple):
    """A case of which the output alone is asked for: a package has no gradients.

    Attributes:
        case: The case.
    """

    case: Case

    @property
    def name(self) -> str:
        """That of the case."""
        return self.case.name

    @property
    def dtype(self) -> str:
        """That of the case."""
        return self.case.dtype

    def drawn(self) -> tuple[Any, ...]:
        """The arrays of the case."""
        return self.case.drawn()

    def expected(self) -> dict[str, Any]:
        """The oracle's output."""
        return {"y": self.case.expected()["y"]}

    def tolerance(self, name: str) -> float:
        """The error that rounding may cause."""
        return self.case.tolerance(name)


def check(as_json: AsJson = None) -> None:
    """Export the shared cases and compare the packages with the oracle; 1 if one fails."""
    versions = {"python": platform.python_version(), "coremltools": coremltools().__version__}
    machine = {"device": {"platform": "cpu", "kind": "NumPy"}, "versions": versions}
    show(rows(CASES), machine, "Core ML packages, evaluated in NumPy", as_json)


def rows(cases: Sequence[Case]) -> Iterator[Json]:
    """Yields what `flash_wtconv_jax.cli.check.show` takes, a row a kind of package and case."""
    forward = [Forward(case) for case in cases]
    backends = (
        Backend(kind, forward, _refusal, partial(_computed, make, evaluate))
        for kind, make, evaluate in (
            ("convs", layer.convs, _between_transforms),
            ("whole", layer.whole, _alone),
        )
    )
    for row in run(backends, _plain):
        yield {"operator": "wtconv", **row}


def _refusal(forward: Forward) -> str | None:
    """The reason why there is no package of a case."""
    case = forward.case
    reasons = {
        "packages are of images": case.ndim != 2,
        "packages are of Haar wavelets": case.wavelet not in IS_HAAR,
        "packages have no stride": case.stride != 1,
        f"Core ML computes in no {case.dtype}": case.dtype not in _PRECISIONS,
        "there is no image": 0 in case.batch,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _plain(forward: Forward) -> Results:
    """The output of the published layer, every array in the case's dtype."""
    cpu = torch.device("cpu")
    return layer_results("eager", cpu, torch.contiguous_format, forward.case)


def _computed(
    make: Callable[..., Any], evaluate: Callable[[Package, Array, int], Array], forward: Forward
) -> dict[str, Array]:
    """The output of the package of a case, image by image."""
    case = forward.case
    x, params, _ = case.drawn()
    images = x.reshape(-1, 1, *x.shape[-3:]).astype(np.float32)
    model = make(params, *case.spatial, precision=_PRECISIONS[case.dtype])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "case.mlpackage"
        package.save(path, model, force=False)
        loaded = Package(path)
    y = np.concatenate([evaluate(loaded, image, case.levels) for image in images])
    return {"y": y.reshape(x.shape)}


def _alone(whole: Package, image: Array, levels: int) -> Array:
    """The output of the whole layer for `[1, H, W, C]`."""
    y = whole.predict({"x": image.transpose(0, 3, 1, 2)})["y"]
    return y.transpose(0, 2, 3, 1)


def _between_transforms(convs: Package, image: Array, levels: int) -> Array:
    """The output of convolutions that stand between the oracle's Haar transforms."""
    inputs = {"x": image.transpose(0, 3, 1, 2)}
    for level, bands in enumerate(wavedec(image, 2, levels), 1):
        n, h, w, _, c = bands.shape
        inputs[f"bands_{level}"] = bands.transpose(0, 4, 3, 1, 2).reshape(n, 4 * c, h, w)
    outputs = convs.predict(inputs)
    filtered = []
    for level in range(1, levels + 1):
        n, c, h, w = outputs[f"filtered_{level}"].shape
        bands = outputs[f"filtered_{level}"].reshape(n, c // 4, 4, h, w)
        filtered.append(bands.transpose(0, 3, 4, 2, 1))
    base = outputs["base"].transpose(0, 2, 3, 1)
    return base + waverec(filtered, 2, image.shape[1:3]) if levels else base
