"""Names that were renamed: the old one still works, warns, and says what replaces it."""

from importlib import import_module

import pytest

pytestmark = pytest.mark.core

ALIASES = [
    ("flash_wtconv_jax", "Conv2D", "Conv2d"),
    ("flash_wtconv_jax.linen", "Conv2D", "Conv2d"),
    ("flash_wtconv_jax.nnx", "Conv2D", "Conv2d"),
    ("pallas_kernels.conv2d", "Config", "TileConfig"),
]


@pytest.mark.parametrize(("module", "old", "new"), ALIASES)
def test_an_old_name_warns_where_it_is_used(module, old, new):
    room = import_module(module)
    message = f"{module}.{old} is now {module}.{new}; the old name is removed in 0.2"
    with pytest.warns(DeprecationWarning) as caught:
        value = getattr(room, old)
    assert [(str(one.message), one.filename) for one in caught] == [(message, __file__)]
    assert issubclass(value, getattr(room, new))
    assert old not in room.__all__
    with pytest.warns(DeprecationWarning, match=message):
        exec(f"from {module} import {old}")
    with pytest.raises(AttributeError, match="Conv2E"):
        room.Conv2E  # noqa: B018 - the access is what is tested
