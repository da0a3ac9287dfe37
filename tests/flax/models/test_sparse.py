"""SparseUNet and SparseResNet: sizes, maps, training, and what padding may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.sparse import drawn_voxels

from flash_wtconv_jax.models import SparseResNet, SparseUNet

pytestmark = pytest.mark.core

SMALL = {"stem_dim": 4, "dims": (4, 6, 5, 4), "depths": (1, 2, 1, 1), "num_spatial_dims": 2}


def test_the_defaults_are_minkunet_14():
    model = nnx.eval_shape(lambda: SparseUNet(3, 20, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    # Counted by hand: kernels of the stem and of stride 2, residual blocks, norms, the head.
    planes, width = (32, 64, 128, 256, 256, 128, 96, 96), 32
    total = 125 * 3 * 32 + 2 * 32
    for i, dim in enumerate(planes):
        if i < 4:
            total += 8 * width * width + 2 * width
        else:
            total += 8 * width * dim + 2 * dim
            width = dim + (128, 64, 32, 32)[i - 4]
        total += 27 * (width * dim + dim * dim) + 4 * dim
        total += (width * dim + 2 * dim) * (width != dim)
        width = dim
    assert sum(sizes) == total + 96 * 20 + 20


@pytest.mark.wide
def test_a_unet_keeps_its_voxels_trains_and_reads_no_padding():
    voxels = drawn_voxels((9, 0, 7), 8, 3)
    # Down and up once, through two blocks: what is deeper is compiled as long again.
    shallow = SMALL | {"dims": (4, 6), "depths": (1, 2)}
    model = SparseUNet(3, 2, **shallow, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(model, nnx.Param, ...)

    def loss(params, stats, voxels):
        y = nnx.merge(graph, params, stats, copy=True)(voxels)
        return (jnp.where(y.valid[:, None], y.features, 0) ** 2).sum(), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, y), grads = step(params, stats, voxels)
    np.testing.assert_array_equal(y.coords, voxels.coords)
    assert y.features.shape == (voxels.capacity, 2)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
    dirty = voxels.with_features(jnp.where(voxels.valid[:, None], voxels.features, jnp.nan))
    (again, _), others = step(params, stats, dirty)
    assert again == value
    jax.tree.map(np.testing.assert_array_equal, grads, others)


@pytest.mark.wide
def test_a_unet_makes_each_map_once():
    voxels = drawn_voxels((9, 7), 8, 3)
    model = SparseUNet(3, 2, **SMALL, rngs=nnx.Rngs(0))
    model.eval()
    program = str(jax.make_jaxpr(lambda voxels: model(voxels))(voxels))
    # Of size 5 in the stem, 2 of stride 2 that lead back too, 3 and 1 at three resolutions.
    assert program.count("name=_made") == 1 + 2 + 3 + 3


@pytest.mark.wide
def test_a_resnet_classifies_samples_each_by_itself():
    voxels = drawn_voxels((9, 0, 7), 8, 3)
    model = SparseResNet(3, 2, dims=(4, 6), depths=(1, 2), num_spatial_dims=2, rngs=nnx.Rngs(0))
    model.eval()
    call = jax.jit(lambda voxels: model(voxels))
    y = call(voxels)
    assert y.shape == (3, 2)
    zeroed = voxels.features * (voxels.coords[:, :1] != 0)
    other = call(voxels.with_features(zeroed))
    np.testing.assert_array_equal(other[1:], y[1:])
    assert (other[0] != y[0]).all()


WRONG = {
    "dims=(4, 4, 4): expected as many": {"dims": (4, 4, 4), "depths": (1, 1, 1)},
    "depths=(1,): expected one for each of dims=(4, 4)": {"dims": (4, 4), "depths": (1,)},
    "depths=0: expected an integer >= 1": {"dims": (4, 4), "depths": (1, 0)},
    "fwd_algo names ['cudnn']": {"fwd_algo": "cudnn"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    with pytest.raises(ValueError) as error:
        SparseUNet(3, 2, **WRONG[message], rngs=nnx.Rngs(0))
    assert message in str(error.value)
