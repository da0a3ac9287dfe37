"""Orbax folders of variables."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flash_wtconv_jax import environment
from flash_wtconv_jax.checkpoints.tensors import check_nested, to_array
from pallas_kernels.common.files import replacing, writing
from pallas_kernels.common.types import Tree
from pallas_kernels.haar.filters import filter_bank

# The file that Orbax writes into the folder of every checkpoint.
_MARK = "_CHECKPOINT_METADATA"
# The file that it writes beside the arrays: of a checkpoint of items, into the folder of each.
_ITEM_MARK = "_METADATA"
# Items of a training's checkpoint that are variables, the averaged ones (EMA) first.
_VARIABLES = ("ema", "params")
# The file beside it for the wavelet, which variables do not hold and a PyTorch state dict does.
_NOTE = "flash_wtconv.json"


def save(
    folder: str | os.PathLike[str],
    variables: Mapping[str, Tree],
    *,
    wavelet: str | None = None,
    force: bool = False,
) -> None:
    """Writes variables as an Orbax checkpoint, whole or not at all.

    Args:
        folder: The folder to make; any Orbax reads it.
        variables: `{"params": ...}` or any nested dict of arrays.
        wavelet: The layers' wavelet, which variables do not hold: a file beside the arrays keeps
            it for `wavelet_of`, and with it for the frozen filters of a PyTorch state dict.
        force: Replace a checkpoint that is there; a folder of anything else is never replaced.

    Raises:
        TypeError: A model in place of its variables.
        FileExistsError: The folder exists and force is False, or it is no checkpoint.
        FileNotFoundError: The folder that it goes into does not exist.
        OSError: It cannot be written, for want of space perhaps.
        RuntimeError: JAX has no device.
        ValueError: The variables are empty or hold an empty array, or the wavelet is unknown.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp()) / "checkpoint"
        >>> save(folder, {"params": {"base_scale": np.ones(3)}})
        >>> restore(folder)
        {'params': {'base_scale': array([1., 1., 1.])}}
    """
    import orbax.checkpoint as ocp

    environment.device()  # Orbax starts JAX.
    if wavelet is not None:
        filter_bank(wavelet)
    folder = Path(folder).absolute()
    if force and folder.exists() and not is_checkpoint(folder):
        raise FileExistsError(f"{folder} is no checkpoint and is not replaced; name another folder")
    tree = _as_arrays(variables)
    with replacing(folder, force) as temporary:
        with writing(folder), ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(temporary, tree)
        if wavelet is not None:
            note_wavelet(temporary, wavelet)


def note_wavelet(folder: Path, wavelet: str) -> None:
    """Writes the file that keeps the wavelet of a checkpoint, or of all that lie in a folder."""
    with replacing(folder / _NOTE, force=True) as temporary:
        temporary.write_text(json.dumps({"wavelet": wavelet}) + "\n")


def restore(folder: str | os.PathLike[str]) -> dict[str, Tree]:
    """Reads the variables of an Orbax checkpoint.

    Args:
        folder: The folder that `save`, or another Orbax writer, has written: the folder of one step
            of a `CheckpointManager`, and of one item where it has several. Of a step of
            `flash-wtconv train` the averaged parameters are taken if it has them.

    Returns:
        The nested dict that was saved, its arrays as NumPy arrays whatever device they lived on. Of
        an nnx state the names of parameters alone: neither their `value` nor states of `Rngs`.

    Raises:
        FileNotFoundError: There is no such folder.
        RuntimeError: JAX has no device.
        ValueError: It is no checkpoint, or a damaged one, or several.
    """
    import jax
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    item = _item(folder)
    environment.device()  # Orbax starts JAX.
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(item).item_metadata
            # As NumPy arrays: devices of the machine that wrote it may not be there.
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved.tree)
            tree = checkpointer.restore(item, restore_args=plain)
    except Exception as error:  # Orbax and its storage raise whatever they stumble over.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"folder {folder} is a damaged Orbax checkpoint: {reason}") from error
    return _without_random_state(_unwrapped(tree) if _is_wrapped(tree) else tree)


def _item(folder: Path) -> Path:
    """The folder of the one pytree in a checkpoint: it itself, or the one of its only item."""
    if (folder / _ITEM_MARK).is_file():
        return folder
    items = sorted(path.parent for path in folder.glob(f"*/{_ITEM_MARK}"))
    if len(items) == 1:
        return items[0]
    if is_checkpoint(folder) and folder / "params" in items:
        # Of `flash-wtconv train`, which keeps the optimizer's memory beside them.
        return next(folder / name for name in _VARIABLES if folder / name in items)
    if is_checkpoint(folder) and not items:
        return folder  # What is missing is for Orbax to say.
    inside = items or sorted(
        (path.parent for path in folder.glob(f"*/{_MARK}")), key=lambda step: (len(step.name), step)
    )
    if inside:
        raise ValueError(
            f"folder {folder} holds several Orbax checkpoints, "
            f"{', '.join(path.name for path in inside)}: name one of them, such as {inside[-1]}"
        )
    raise ValueError(f"folder {folder} is no Orbax checkpoint: it holds no {_MARK}")


def _is_wrapped(tree: Tree) -> bool:
    """Whether every array is the `value` of a variable, as in an nnx state that Orbax was given."""
    return isinstance(tree, Mapping) and (
        _is_variable(tree) or all(_is_wrapped(child) for child in tree.values())
    )


def _is_variable(tree: Mapping[str, Tree]) -> bool:
    return set(tree) == {"value"} and not isinstance(tree["value"], Mapping)


def _unwrapped(tree: Mapping[str, Tree]) -> Tree:
    """The tree with the value of each variable in place of the variable."""
    if _is_variable(tree):
        return tree["value"]
    return {key: _unwrapped(child) for key, child in tree.items()}


def _without_random_state(tree: Tree) -> Tree:
    """The tree without the streams of nnx's `Rngs`, and without what holds nothing else."""
    if not isinstance(tree, Mapping):
        return tree
    inner = {
        key: _without_random_state(child)
        for key, child in tree.items()
        if not _is_random_stream(child)
    }
    return {key: child for key, child in inner.items() if not isinstance(child, Mapping) or child}


def _is_random_stream(tree: Tree) -> bool:
    """Whether this is the state of an `RngStream`: a key, and how often it was split."""
    if not isinstance(tree, Mapping) or set(tree) != {"count", "key"}:
        return False
    return getattr(tree["count"], "dtype", None) == np.uint32


def wavelet_of(folder: str | os.PathLike[str], named: str | None = None) -> str | None:
    """The wavelet of the layers whose variables a folder holds.

    Args:
        folder: An Orbax checkpoint, or the folder of a training or of one of its steps.
        named: What the caller takes it for, which must agree with what `save` was given.

    Returns:
        What `save` was given; `named` if it was given none.

    Raises:
        ValueError: The file that keeps it is damaged, or names another wavelet than `named`.
    """
    note = next((path / _NOTE for path in _near(Path(folder)) if (path / _NOTE).is_file()), None)
    if note is None:
        return named
    try:
        wavelet = str(json.loads(note.read_text())["wavelet"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{note} is damaged, expected {{"wavelet": name}}') from error
    if named is not None and not np.array_equal(filter_bank(named), filter_bank(wavelet)):
        raise ValueError(
            f"wavelet is {named!r}, but {folder} names {wavelet!r}: its layers were trained with "
            "that one"
        )
    return wavelet


def _near(folder: Path) -> list[Path]:
    """The folders whose note is of the variables that `restore` finds in a folder."""
    items = [path.parent for path in folder.glob(f"*/{_ITEM_MARK}")]
    if len(items) == 1:
        return [folder, *items]
    # One note for all steps of a training lies beside them.
    inside = is_checkpoint(folder) or (folder / _ITEM_MARK).is_file()
    return [folder, *(list(folder.absolute().parents)[:2] if inside else [])]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is an Orbax checkpoint."""
    return (folder / _MARK).is_file()


def _as_arrays(tree: Mapping[str, Tree], path: str = "variables") -> dict[str, Tree]:
    check_nested(tree, path)
    if not tree:
        raise ValueError(f"{path} is empty, expected arrays")
    result: dict[str, Tree] = {}
    for key, value in tree.items():
        name = f"{path}.{key}"
        if isinstance(value, Mapping):
            result[str(key)] = _as_arrays(value, name)
            continue
        result[str(key)] = array = to_array(value)
        if not array.size:
            raise ValueError(f"{name} has shape {array.shape}, expected at least one element")
    return result
