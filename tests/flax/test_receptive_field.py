"""The effective receptive field, against supports and gradients known by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax.nnx import WTConv2d
from flash_wtconv_jax.receptive_field import (
    contribution_side,
    effective_receptive_field,
    reaches_border,
)

pytestmark = pytest.mark.core


def test_a_linear_map_gives_its_own_taps():
    def features(x):
        return 2 * x + 3 * jnp.roll(x, 1, axis=1) - 0.5 * jnp.roll(x, -1, axis=2)

    field = effective_receptive_field(features, (5, 7, 1), samples=1)
    expected = np.zeros((5, 7))
    expected[2, 3], expected[1, 3], expected[2, 4] = 2, 3, 0.5
    np.testing.assert_allclose(field, expected, rtol=1e-6)
    assert field.dtype == np.float64


def test_input_channels_add_up():
    field = effective_receptive_field(lambda x: x[..., :1] - x[..., 1:], (3, 3, 2), samples=1)
    assert field[1, 1] == pytest.approx(2)
    assert field.sum() == pytest.approx(2)


def test_strided_features_are_centred_on_the_input():
    def features(x):
        return x.reshape(-1, 4, 3, 4, 3, 1).mean(axis=(2, 4))

    field = effective_receptive_field(features, (12, 12, 1))
    # The middle pair of four units of three pixels each.
    np.testing.assert_array_equal(field > 0, np.pad(np.ones((6, 6), bool), 3))


def test_a_field_that_goes_on_beyond_its_picture_is_told():
    plots = pytest.importorskip("flash_wtconv_jax.plots", exc_type=ImportError)
    small, large = np.full((9, 9), 1e-5), np.full((9, 9), 1e-3)
    small[4, 4] = large[4, 4] = 1.0
    assert not reaches_border(small) and reaches_border(large)
    figure = plots.receptive_fields({"small": small, "large": large})
    texts = [axes.get_xlabel() for axes in figure.axes[:2]]
    assert ["reaches the border" in text for text in texts] == [False, True]
    assert figure.axes[0].get_title() == "small\n9 x 9 px"
    assert list(figure.axes[0].get_xticks()) == [-4.5, -2.25, 0, 2.25, 4.5]


@pytest.mark.parametrize(("depth", "side"), [(0, 4), (2, 16)])
def test_wtconv_sees_what_its_levels_reach(depth, side):
    layer = WTConv2d(2, kernel_size=3, depth=depth, rngs=nnx.Rngs(0))
    field = effective_receptive_field(layer, (32, 32, 2), samples=8)
    # Each unit of the middle pair sees three blocks of 2**depth pixels, four blocks together.
    assert contribution_side(field, 1.0) == side
    np.testing.assert_array_equal((field > 0).any(axis=0), np.abs(np.arange(32) - 15.5) < side / 2)


@pytest.mark.wide
def test_the_seed_fixes_the_field():
    def features(x):
        return x**2

    one, same, other = (
        effective_receptive_field(features, (3, 3, 1), samples=8, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("shape", "samples", "message"),
    [
        ((8, 8), 1, r"shape must be \(H, W, C\).*got \(8, 8\)"),
        ((8, 0, 1), 1, r"shape must be \(H, W, C\).*got \(8, 0, 1\)"),
        ((8, 8, 1), 0, "samples must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(shape, samples, message):
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(lambda x: x, shape, samples=samples)


def test_features_of_another_rank_are_named():
    with pytest.raises(ValueError, match=r"features must return .* got shape \(8,\)"):
        effective_receptive_field(lambda x: x.sum(axis=(1, 2, 3)), (4, 4, 1), samples=1)


def test_sides_of_known_fields():
    assert contribution_side(np.ones((10, 10)), 1.0) == 10
    assert contribution_side(np.ones((10, 10)), 0.16) == 4
    assert contribution_side(np.ones((9, 9)), 0.1) == 3
    point = np.zeros((9, 11))
    point[4, 5] = 1
    assert contribution_side(point, 1.0) == 1
    point[0, 5] = 1
    assert contribution_side(point, 0.5) == 1
    assert contribution_side(point, 0.6) == 9


@pytest.mark.parametrize("share", [0, 1.1, -1])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match="share must be in"):
        contribution_side(np.ones((2, 2)), share)


@pytest.mark.parametrize("field", [np.zeros((2, 2)), np.ones(4), np.full((2, 2), np.nan)])
def test_an_empty_field_is_named(field):
    with pytest.raises(ValueError, match="field must be a matrix with a positive sum"):
        contribution_side(field, 0.5)
