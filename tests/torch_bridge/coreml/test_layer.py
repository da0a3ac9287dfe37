"""Packages of the layer, against the oracle, and faults that the check must find."""

from itertools import product

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch_bridge  # noqa: E402
from pallas_kernels import oracle  # noqa: E402
from pallas_kernels.common.conformance import worst  # noqa: E402
from pallas_kernels.wtconv.cases import CASES, Case  # noqa: E402
from torch_bridge.coreml import check, layer  # noqa: E402
from torch_bridge.coreml.package import About, Input, converted  # noqa: E402
from torch_bridge.coreml.tools import quiet  # noqa: E402

# Odd at the first level and at a deeper one, levels of one pixel, several images, low precision.
HARD = [
    Case((14, 10), 2, 5, batch=(2,)),
    Case((7, 3), 5, 3, "float16", batch=()),
    Case((9, 6), 0, 4),
]
SIZES = (16, 32), (13, 6), (32, 16)


def failed(cases):
    return [row for row in check.rows(cases) if row["status"] != "pass"]


def test_hard_cases_are_the_oracles():
    assert failed(HARD) == []


@pytest.mark.wide
def test_the_shared_cases_are_the_oracles():
    rows = list(check.rows(CASES))
    assert [row for row in rows if row["status"] == "fail"] == []
    assert sum(row["status"] == "pass" for row in rows) == 22


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_every_number_of_levels_at_three_sizes(dtype, levels):
    assert failed([Case(size, levels, 5, dtype, batch=(1,)) for size in SIZES]) == []


FLEXIBLE = [
    (2, "fp32"),
    *(
        pytest.param(levels, precision, marks=pytest.mark.wide)
        for levels, precision in ((1, "fp16"), (3, "fp32"), (4, "fp16"), (5, "fp32"))
    ),
]


def plain_half(params, x):
    """The result of plain PyTorch in float16."""
    module = torch_bridge.from_jax({"params": params}).cpu().half()
    module.implementation = "eager"
    y = module(torch.from_numpy(x.transpose(0, 3, 1, 2)).half())
    return y.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("levels", "precision"), FLEXIBLE)
def test_flexible_packages_at_sizes_that_they_were_not_made_at(written, levels, precision):
    side = 2**levels
    dtype = "float32" if precision == "fp32" else "float16"
    case = Case((side, 2 * side), levels, 5, dtype, batch=(1,), channels=2)
    params = case.drawn()[1]
    makers = {"whole": layer.whole, "convs": layer.convs}
    packages = {
        kind: written(make(params, *case.spatial, precision=precision, flexible=True), kind)
        for kind, make in makers.items()
    }
    for spatial in ((2 * side, side), (2 * side, 4 * side), (side, 3 * side)):
        x = Case(spatial, levels, 5, dtype, batch=(1,), channels=2).drawn()[0]
        want = oracle.wtconv(x, params, 2)
        bound = 1e-5 if precision == "fp32" else 2 * worst(plain_half(params, x), want)
        for kind, evaluate in (("whole", check._alone), ("convs", check._between_transforms)):
            got = evaluate(packages[kind], x.astype(np.float32), levels)
            assert worst(got, want) <= bound, (kind, spatial)


def test_a_flexible_package_takes_what_its_levels_halve_evenly(written):
    params = Case((8, 8), 3, 3).drawn()[1]
    with pytest.raises(ValueError, match="height is 12, but .* multiple of 8.* such as 16"):
        layer.whole(params, 12, 8, precision="fp32", flexible=True)
    package = written(layer.whole(params, 8, 8, precision="fp32", flexible=True))
    with pytest.raises(ValueError, match=r"input x has shape .*12, 8\), expected \(1, 3, 8, 8\)"):
        package.predict({"x": np.zeros((1, 3, 12, 8))})
    package = written(layer.convs(params, 8, 8, precision="fp32", flexible=True), "convs")
    with pytest.raises(ValueError, match="expected one within"):
        package.predict({name: np.zeros((1, 3, 17, 8)) for name in package.inputs})


def test_convs_tell_their_interface_and_their_weights(written):
    case = Case((7, 12), 2, 3, "float16")
    params = case.drawn()[1]
    package = written(layer.convs(params, 7, 12, precision="fp16"))
    bands = {"bands_1": (1, 12, 4, 6), "bands_2": (1, 12, 2, 3)}
    assert package.inputs == {"x": (1, 3, 7, 12), **bands}
    assert package.outputs == {
        "base": (1, 3, 7, 12),
        "filtered_1": bands["bands_1"],
        "filtered_2": bands["bands_2"],
    }
    outputs = package.predict({n: np.ones(shape) for n, shape in package.inputs.items()})
    assert {value.dtype for value in outputs.values()} == {np.dtype(np.float32)}
    own = {
        key.removeprefix("flash_wtconv."): value
        for key, value in package.metadata.items()
        if key.startswith("flash_wtconv.")
    }
    assert len(own.pop("source_hash")) == 64 and own.pop("version")
    assert own == {
        "kind": "convs",
        "channels": "3",
        "height": "7",
        "width": "12",
        "levels": "2",
        "kernel_size": "3",
        "precision": "fp16",
    }


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_packages_of_both_kinds_hold_the_weights(written, levels):
    params = Case((7, 12), levels, 3).drawn()[1]
    want = layer.folded(params)
    for make, precision in product((layer.convs, layer.whole), ("fp32", "fp16")):
        package = written(make(params, 7, 12, precision=precision), f"{make.__name__}{precision}")
        got = layer.folded(layer.params_of(package))
        for one, other in zip(
            (got.base, got.bias, *got.wavelet), (want.base, want.bias, *want.wavelet), strict=True
        ):
            np.testing.assert_allclose(
                one, other, rtol=0 if precision == "fp32" else 1e-3, atol=1e-7
            )


def test_a_network_is_no_layer(written):
    about = About("wtconvnext_tiny", (2, 4, 4), "fp32", "", 0, 3, "A test.")
    taps = np.ones((2, 1, 3, 3), np.float32)
    build = lambda x: {"y": layer.depthwise(x, taps, name="y")}  # noqa: E731
    package = written(converted({"x": Input((1, 2, 4, 4))}, build, about))
    with pytest.raises(ValueError, match="kind wtconvnext_tiny, expected one of convs, whole"):
        layer.params_of(package)


def swapped_subbands(monkeypatch):
    monkeypatch.setattr(layer, "_HAAR", layer._HAAR[[0, 2, 1, 3]])


def transposed_weights(monkeypatch):
    folded = layer.folded

    def transposed(params):
        own = folded(params)
        return own._replace(wavelet=tuple(taps.swapaxes(2, 3) for taps in own.wavelet))

    monkeypatch.setattr(layer, "folded", transposed)


def wrong_crop(monkeypatch):
    with quiet():
        from coremltools.converters.mil import Builder

    crop = Builder.slice_by_size

    def shifted(x, begin, size):
        return crop(x=x, begin=[0, 0, int(x.shape[2] - size[2]), 0], size=size)

    monkeypatch.setattr(Builder, "slice_by_size", shifted)


@pytest.mark.parametrize("fault", [swapped_subbands, transposed_weights, wrong_crop])
def test_the_check_finds_planted_faults(monkeypatch, fault):
    fault(monkeypatch)
    rows = failed([Case((7, 6), 2, 3, batch=(1,))])
    kinds = {"convs", "whole"} if fault is transposed_weights else {"whole"}
    assert {row["backend"] for row in rows} == kinds
    assert all("y is off by" in row["reason"] for row in rows)


def test_it_says_of_every_case_why_there_is_no_package():
    reasons = {
        row["reason"] for row in check.rows([Case((4,), 1, 3), Case((4, 4), 1, 3, "float64")])
    }
    assert reasons == {"packages are of images", "Core ML computes in no float64"}


@pytest.mark.parametrize(("height", "width"), list(product((24, 46, 64), (8, 100))))
def test_flexible_sizes_are_few_enough(height, width):
    shape = 1, 2, height, width
    others = layer.flexible_shapes(shape, 2)
    assert shape not in others and len(others) < 128
    assert all(h % 2 == w % 2 == 0 for *_, h, w in others)
    assert (1, 2, 2 * height, 2 * width) in others
