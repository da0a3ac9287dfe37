"""The layer in ONNX, as `torch.onnx.export` writes it and onnxruntime runs it."""

import importlib.util
import logging
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
if importlib.util.find_spec("onnxscript") is None:
    # Not imported here, where every worker would wait for it.
    pytest.skip("needs onnxscript", allow_module_level=True)

import torch_bridge  # noqa: E402

SIZES = (19, 22), (7, 5), (32, 40), (64, 33)


@pytest.fixture(autouse=True)
def quiet():
    """PyTorch's exporter calls what it calls deprecated itself, and looks for torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
        yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("levels", "dynamic"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_onnxruntime_computes_what_the_layer_does(levels, dynamic):
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(
        4, 4, wt_levels=levels, device="cpu", implementation="eager"
    ).eval()
    told = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        layer,
        (torch.randn(1, 4, *SIZES[0]),),
        dynamo=True,
        dynamic_shapes={"x": {2: told, 3: told}} if dynamic else None,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (source,) = session.get_inputs()
    for size in SIZES if dynamic else SIZES[:1]:
        x = torch.randn(1, 4, *size)
        (got,) = session.run(None, {source.name: x.numpy()})
        np.testing.assert_allclose(got, layer(x).detach().numpy(), atol=1e-5)
