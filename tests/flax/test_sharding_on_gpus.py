"""Every operator over two GPUs of a host, beside one, by `flash-wtconv bench sharding`."""

from functools import cache, partial

import jax
import pytest

from flash_wtconv_jax.bench import sharding
from flash_wtconv_jax.bench.sharding_cases import cases

GPUS = jax.local_device_count() if jax.default_backend() == "gpu" else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs of one host, here are {GPUS}"),
]
# Where there are no GPUs, nobody who collects this makes their arrays.
NAMES = [case.name for case in cases(True, 1)] if GPUS > 1 else []


@pytest.mark.parametrize("kind", [*sharding.KINDS, "shard_map"])
@pytest.mark.parametrize("name", NAMES)
def test_operators_are_those_of_one_gpu(name, kind):
    (case,) = (case for case in cases(False, 2) if case.name == name)
    one = cache(partial(sharding.alone, case, jax.local_devices()[0]))
    for split in case.splits[0] if kind == "shard_map" else case.splits:
        row = sharding.compared(case, one, split, kind, 2)
        assert row["wrong"] is None, row
        if name.startswith("wtconv2d"):
            assert row["kernels"], row


@pytest.mark.parametrize("part", ["training", "rows"])
def test_programs_of_two_gpus_gather_no_image(part):
    report = sharding.run(lambda *_: lambda: None, [part], [1, 2], minutes=60)
    assert not report["left"] and not report["failed"]
    for row in report["rows"]:
        assert row["wrong"] is None, row
        assert row["kernels"], row
