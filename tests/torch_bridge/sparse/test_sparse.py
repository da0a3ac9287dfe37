"""Sparse convolutions in PyTorch: the oracle's and JAX's results, derivatives, forms of call."""

import pytest

torch = pytest.importorskip("torch")

from pallas_kernels.common.conformance import bounds, expected, worst  # noqa: E402
from pallas_kernels.sparse.cases import CASES  # noqa: E402
from pallas_kernels.sparse.depthwise.cases import CASES as DEPTHWISE  # noqa: E402
from torch_bridge.sparse import conformance  # noqa: E402

CPU = torch.device("cpu")


def assert_oracle(case, implementation, device=CPU):
    """Output, coordinates and gradients of a case are the oracle's."""
    got, want = conformance.computed(case, implementation, device), expected(case)
    assert {name: array.shape for name, array in got.items()} == {
        name: array.shape for name, array in want.items()
    }
    allowed = bounds(case, lambda case: conformance.baseline(case, device))
    found = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


@pytest.mark.parametrize("case", [*CASES, *DEPTHWISE], ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, None)
