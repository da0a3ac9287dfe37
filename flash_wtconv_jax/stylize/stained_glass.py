"""A picture in the style of leaded glass, drawn by code: the shipped network was trained on it."""

import numpy as np

_COLOURS = (
    (18, 52, 120),
    (30, 110, 170),
    (12, 150, 140),
    (240, 180, 40),
    (226, 98, 32),
    (186, 28, 50),
    (246, 226, 170),
    (98, 38, 112),
)
_LEAD = 22, 20, 26
_PANES = 420


def drawn(side: int = 512, seed: int = 0) -> np.ndarray:
    """Panes of glass in lead, brighter towards their middles: uint8 `[side, side, 3]`.

    Args:
        side: Height and width in pixels, at least 64.
        seed: Of where panes are and which colours they have.

    Raises:
        ValueError: `side` is less than 64.

    Example:
        >>> drawn(64).shape
        (64, 64, 3)
    """
    if side < 64:
        raise ValueError(f"side is {side}, expected at least 64")
    rng = np.random.default_rng(seed)
    centres = rng.random((_PANES, 2)) * side
    colours = np.array(_COLOURS, np.float32)[rng.integers(len(_COLOURS), size=_PANES)]
    rows = np.arange(side, dtype=np.float32)
    # Panes lean along waves, so that strokes have directions.
    y, x = np.meshgrid(rows, rows, indexing="ij")
    wave = side / 36 * np.sin(2 * np.pi * 3 * np.stack([x, y]) / side)
    y, x = y + wave[0], x + wave[1]
    squares = (y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2
    nearest = np.argpartition(squares, 1, axis=-1)[..., :2]
    first, second = np.moveaxis(np.sqrt(np.take_along_axis(squares, nearest, -1)), -1, 0)
    swapped = first > second
    pane = np.where(swapped, nearest[..., 1], nearest[..., 0])
    first, second = np.minimum(first, second), np.maximum(first, second)
    light = 1.15 - 0.45 * first / second
    glass = colours[pane] * light[..., None]
    edge = np.clip((second - first) / 3 - 0.4, 0, 1)[..., None]
    pixels = edge * glass + (1 - edge) * np.array(_LEAD, np.float32)
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)
