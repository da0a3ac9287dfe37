"""Checkpoints of a training by Orbax: written beside the steps, the best and the last are kept.

A checkpoint holds the parameters, their averages, the optimizer's memory, and the place of grain's
iterator. It is whole or it is not there: a kill or a full disk leaves the one before.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flash_wtconv_jax.checkpoints.orbax import note_wavelet
from flash_wtconv_jax.train.images import optimizers
from flash_wtconv_jax.train.loop import State
from pallas_kernels.common.files import replacing, writing
from pallas_kernels.common.types import Json, Tree

FOLDER = "checkpoints"
"""The folder of the checkpoints inside that of a run, each named by its step."""
NETWORK = "network.json"
"""The file in it that `models.load_network` rebuilds the network from."""
_SCORE = "score"


class Saver:
    """Writes and reads the checkpoints of a run; see `saving`.

    Args:
        manager: Orbax's.
    """

    def __init__(self, manager: ocp.CheckpointManager) -> None:
        self.manager = manager

    def save(
        self,
        state: State,
        place: grain.DatasetIterator,
        progress: Json,
        score: float | None,
    ) -> None:
        """Begins to write a checkpoint, once the one before is written.

        Args:
            state: What steps change; the next may change it at once.
            place: The iterator of the training's batches.
            progress: What else the run goes on from.
            score: What networks are judged by, if this one was evaluated.

        Raises:
            OSError: If this or the one before cannot be written; the last whole one stands.
        """
        with writing(Path(self.manager.directory)):
            self.manager.save(
                progress["step"],
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()},
                    place=grain.checkpoint.CheckpointSave(place),
                    progress=ocp.args.JsonSave(progress),
                ),
                metrics=None if score is None else {_SCORE: score},
                force=True,
            )

    def wait(self) -> None:
        """Returns when the last checkpoint is written.

        Raises:
            OSError: If it cannot be.
        """
        with writing(Path(self.manager.directory)):
            self.manager.wait_until_finished()

    @property
    def last(self) -> int | None:
        """The step of the last checkpoint, None if there is none."""
        return self.manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint, None if none was evaluated."""
        return self.manager.best_step()

    def progress(self, step: int) -> Json:
        """The progress that `save` was given beside the state.

        Raises:
            ValueError: If the checkpoint is damaged.
        """
        with _reading(self._folder(step)):
            args = ocp.args.Composite(progress=ocp.args.JsonRestore())
            return dict(self.manager.restore(step, args=args)["progress"])

    def restore(self, step: int, like: State, shardings: State) -> State:
        """The state of a checkpoint, on the devices of this run.

        Args:
            step: The checkpoint's.
            like: The shapes of the state.
            shardings: Where its arrays lie.

        Raises:
            ValueError: If the checkpoint is damaged, or that of another network or optimizer.
        """
        described = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            like,
            shardings,
        )
        trees = _trees(described)
        targets = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        with _reading(self._folder(step)):
            found = self.manager.restore(step, args=ocp.args.Composite(**targets))
        return _state(found, described)

    def restore_place(self, step: int, place: grain.DatasetIterator) -> None:
        """Puts the iterator of a training's batches where it was.

        Raises:
            ValueError: If the checkpoint is damaged.
        """
        with _reading(self._folder(step)):
            args = ocp.args.Composite(place=grain.checkpoint.CheckpointRestore(place))
            self.manager.restore(step, args=args)

    def _folder(self, step: int) -> Path:
        return Path(self.manager.directory) / str(step)


@contextmanager
def saving(run: Path, keep: int) -> Iterator[Saver]:
    """Yields the saver of a run's folder; what it has begun to write is whole when the block ends.

    Args:
        run: The folder of the run.
        keep: The last checkpoints that stay, beside the best.
    """
    policy = preservation_policy.AnyPreservationPolicy(
        [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(
                get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=_score,
        preservation_policy=policy,
        cleanup_tmp_directories=True,
    )
    manager = ocp.CheckpointManager((run / FOLDER).absolute(), options=options)
    try:
        yield Saver(manager)
    finally:
        with writing(run / FOLDER):
            manager.close()


def write_network(run: Path, config: Json, wavelet: str) -> None:
    """Writes what `models.load_network` rebuilds the network of every checkpoint from.

    Args:
        run: The folder of the run.
        config: See `pretrained.description`.
        wavelet: Of its layers, which `convert` writes into the files of PyTorch.
    """
    with replacing(run / FOLDER / NETWORK, force=True) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    note_wavelet(run / FOLDER, wavelet)


def _score(scores: Mapping[str, float]) -> float:
    return scores[_SCORE]


def _trees(state: State) -> dict[str, Tree]:
    """The items of a checkpoint: variables by name, and what else changes as it comes."""
    trees = {"params": _variables(state.params)}
    if state.ema is not None:
        trees["ema"] = _variables(state.ema)
    rest = jax.tree.leaves((state.step, state.memory))
    return trees | {"memory": {f"{index:04d}": leaf for index, leaf in enumerate(rest)}}


def _state(trees: Mapping[str, Tree], like: State) -> State:
    """The state of which `_trees` makes these."""
    memory = [trees["memory"][name] for name in sorted(trees["memory"])]
    step, memory = jax.tree.unflatten(jax.tree.structure((like.step, like.memory)), memory)
    ema = None if like.ema is None else _params(trees["ema"], like.ema)
    return State(step, _params(trees["params"], like.params), ema, memory)


def _variables(params: nnx.State) -> Tree:
    """Parameters as the variables that `checkpoints.restore` gives."""
    tree: Tree = {}
    names = jax.tree.leaves(optimizers.names_of(params))
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        *folders, last = name.split(".")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = leaf
    return {"params": tree}


def _params(variables: Tree, like: nnx.State) -> nnx.State:
    """The parameters of which `_variables` makes these."""

    def leaf(name: str) -> jax.Array:
        return reduce(lambda tree, key: tree[key], name.split("."), variables["params"])

    return jax.tree.map(leaf, optimizers.names_of(like))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and its storage raise whatever they stumble over.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder} cannot be gone on from: {reason}") from error
