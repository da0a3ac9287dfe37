"""The evaluator: its operations beside PyTorch's, and what it refuses; the inputs of Swift."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from torch_bridge.coreml import evaluator, inputs, operations  # noqa: E402
from torch_bridge.coreml.layer import depthwise  # noqa: E402
from torch_bridge.coreml.package import About, Input, converted  # noqa: E402
from torch_bridge.coreml.program import Operation, Result  # noqa: E402


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def same(got, want):
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions(groups, stride, dilation):
    x, bias = drawn(2, 4, 9, 8), drawn(8)
    weight = drawn(8, 4 // groups, 3, 2)
    shared = {"strides": [stride] * 2, "dilations": [dilation] * 2, "groups": groups, "bias": bias}
    got = operations.conv(x, weight, pad_type="custom", pad=[1, 2, 0, 1], **shared)
    tensors = [torch.from_numpy(a) for a in (x, weight, bias)]
    padded = F.pad(tensors[0], (0, 1, 1, 2))
    same(got, F.conv2d(padded, *tensors[1:], stride, 0, dilation, groups))
    back = drawn(4, 6 // 2 if groups > 1 else 6, 3, 2)
    own = {**shared, "bias": None}
    outside = torch.from_numpy(back)
    same(
        operations.conv_transpose(x, back, **own),
        F.conv_transpose2d(tensors[0], outside, None, stride, 0, 0, groups, dilation),
    )


def test_norms_borders_and_activations():
    x = drawn(2, 3, 6, 5)
    tensor, scale, bias = (torch.from_numpy(a) for a in (x, drawn(3), drawn(3) + 1))
    channels_last = F.layer_norm(tensor.movedim(1, -1), (3,), scale, bias, 1e-3).movedim(-1, 1)
    same(operations.layer_norm(x, [1], scale.numpy(), bias.numpy(), 1e-3), channels_last)
    want = F.instance_norm(tensor, weight=scale, bias=bias, eps=1e-3)
    same(operations.instance_norm(x, scale.numpy(), bias.numpy(), 1e-3), want)
    same(operations.gelu(x), F.gelu(tensor))
    same(operations.softmax(x, 1), F.softmax(tensor, 1))
    same(operations.pad(x, [2, 1, 3, 0], "reflect"), F.pad(tensor, (3, 0, 2, 1), "reflect"))
    same(operations.upsample_nearest_neighbor(x, 2, 3), F.interpolate(tensor, scale_factor=(2, 3)))
    same(
        operations.reduce_l2_norm(x, [2, 3], True),
        torch.linalg.norm(tensor, dim=(2, 3), keepdim=True),
    )


def test_compressed_weights():
    indices = np.random.default_rng(0).integers(0, 2**6, 30)
    bits = np.unpackbits(indices.astype(np.uint8)[:, None], axis=1, bitorder="little")[:, :6]
    packed = np.packbits(bits.reshape(-1), bitorder="little")
    lut = drawn(64)
    got = operations.constexpr_lut_to_dense(packed, lut, [5, 6])
    np.testing.assert_array_equal(got, lut[indices].reshape(5, 6))
    numbers = np.array([[2, -3], [4, 5]], np.int8)
    got = operations.constexpr_affine_dequantize(numbers, np.int8(1), np.array([0.5, 2.0]), 0)
    np.testing.assert_array_equal(got, [[0.5, -2.0], [6.0, 8.0]])


def test_an_unknown_operation_is_an_error_by_name():
    result = (Result("y", np.float32, (1,)),)
    with pytest.raises(NotImplementedError, match="operation matmul .which computes y. is not"):
        evaluator._check_known(Operation("matmul", {}, result))
    with pytest.raises(NotImplementedError, match="does not know: transposed"):
        evaluator._check_known(Operation("relu", {"x": "x", "transposed": "y"}, result))
    with pytest.raises(ValueError, match="computes y of shape .2,., but the program declares .1,."):
        evaluator._computed(Operation("relu", {"x": np.ones(2)}, result), {})


def test_a_damaged_program_is_an_error():
    result = (Result("y", np.float32, (1,)),)
    with pytest.raises(ValueError, match="operation relu lacks z: the program is damaged"):
        evaluator._check_whole(Operation("relu", {"x": "z"}, result), {"x"})
    with pytest.raises(ValueError, match="operation add lacks y: the program is damaged"):
        evaluator._check_whole(Operation("add", {"x": "x"}, result), {"x"})


def test_values_inside_and_wrong_inputs(written):
    taps = np.ones((2, 1, 3, 3), np.float32)
    about = About("test", (2, 4, 4), "fp32", "", 0, 3, "A test.")

    def build(x):
        return {"y": depthwise(depthwise(x, taps, name="inside"), taps, name="y")}

    package = written(converted({"x": Input((1, 2, 4, 4))}, build, about))
    x = drawn(1, 2, 4, 4)
    found = package.predict({"x": x}, ["inside", "y"])
    inside = F.conv2d(torch.from_numpy(x), torch.ones(2, 1, 3, 3), padding=1, groups=2)
    same(found["inside"], inside)
    for wrong, message in (
        ({}, r"inputs are \[\], expected \['x'\]"),
        ({"x": x, "z": x}, "expected"),
        ({"x": x[:, :1]}, r"input x has shape \(1, 1, 4, 4\), expected \(1, 2, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            package.predict(wrong)
    with pytest.raises(ValueError, match="are no values of the program"):
        package.predict({"x": x}, ["nothing"])


def test_what_is_no_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="no package"):
        evaluator.Package(tmp_path / "none.mlpackage")
    damaged = tmp_path / "damaged.mlpackage"
    damaged.mkdir()
    (damaged / "Manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is no package that can be read"):
        evaluator.Package(damaged)


def test_the_formula_and_raw_files(tmp_path):
    x = inputs.formula(2, 3, 4)
    flat = [((i * 2654435761 + 12345) % 2**32 >> 8) / 2**23 - 1 for i in range(24)]
    np.testing.assert_array_equal(x.ravel().astype(np.float64), flat)
    assert x.shape == (1, 2, 3, 4) and x.dtype == np.float32
    inputs.write_raw(tmp_path / "x.raw", x)
    np.testing.assert_array_equal(inputs.read_raw(tmp_path / "x.raw", 2, 3, 4), x)
    assert (tmp_path / "x.raw").read_bytes()[:4] == np.float32(flat[0]).tobytes()
    with pytest.raises(FileExistsError):
        inputs.write_raw(tmp_path / "x.raw", x)
    with pytest.raises(ValueError, match="has 96 bytes, expected 48"):
        inputs.read_raw(tmp_path / "x.raw", 1, 3, 4)
    with pytest.raises(ValueError, match="float64, expected float32"):
        inputs.write_raw(tmp_path / "y.raw", x.astype(np.float64))
    with pytest.raises(ValueError, match="width is 0"):
        inputs.formula(1, 1, 0)
