"""Tiles of matrix products, and those that Triton kernels take unasked."""

from typing import NamedTuple


class TileConfig(NamedTuple):
    """Tiles of a matrix product: each block computes `block_m` rows of `block_n` features.

    Rows are the pixels of a dense convolution's output, of all images, or the voxels of a sparse
    one's.

    Attributes:
        block_m: Rows of the output, a power of two from 16 on.
        block_n: Features, a multiple of 16; for Triton a power of two.
        block_k: Products of a tap and a channel that are summed at once, as the others.
        ratio_m: Warps of a block along M.
        ratio_n: Warps of a block along N; `ratio_m * ratio_n` is a power of two up to 32.
        stages: Tiles that are under way from memory at once; 1 multiplies as it loads.
    """

    block_m: int = 64
    block_n: int = 128
    block_k: int = 32
    ratio_m: int = 2
    ratio_n: int = 2
    stages: int = 3


def tiles(rows: int, columns: int, channels: int, dtype: object) -> TileConfig:
    """The default tiles of a product with this number of rows and columns, of arrays of a dtype.

    Where the channels allow it, all of a tile along K belongs to one tap, whose addresses are cheap
    to compute.

    Example:
        >>> tiles(32768, 320, 320, "bfloat16")
        TileConfig(block_m=128, block_n=128, block_k=64, ratio_m=4, ratio_n=2, stages=3)
    """
    wide = str(dtype).split(".")[-1] == "float32"
    block_m = min(64 if wide else 128, power_of_two(rows))
    block_n = min(64 if wide else 128, power_of_two(columns))
    warps = 8 if block_m * block_n == 128 * 128 else 4
    block_k = 32 if wide or channels % 64 and channels % 32 == 0 else 64
    return TileConfig(block_m, block_n, block_k, warps // 2, 2)


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`, and at least 16 for the tensor cores.

    Example:
        >>> power_of_two(33)
        64
    """
    return max(16, 1 << (size - 1).bit_length())


def launched(config: TileConfig) -> dict[str, int]:
    """The constants and options of a Triton launch that tiles set.

    Example:
        >>> launched(TileConfig(64, 32, 16, 2, 1, 4))
        {'BM': 64, 'BN': 32, 'BK': 16, 'num_warps': 2, 'num_stages': 4}
    """
    if config.block_n & (config.block_n - 1):
        raise ValueError(f"config.block_n={config.block_n}: Triton takes a power of two")
    return {
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "num_warps": config.ratio_m * config.ratio_n,
        "num_stages": config.stages,
    }
