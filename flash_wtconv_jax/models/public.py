"""Networks from checkpoints by path, or from public ones by name."""

import hashlib
import logging
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import platformdirs

from flash_wtconv_jax.models.convnext import ConvNeXt
from flash_wtconv_jax.models.pretrained import load_network
from pallas_kernels.common.files import replacing

_TIMEOUT = 60
_BLOCK = 1 << 20
_log = logging.getLogger(__name__)


class Public(NamedTuple):
    """A checkpoint that others have published.

    Attributes:
        origin: Where its authors offer it.
        licence: Of the repository that offers it.
        url: The file; None where it can only be fetched by hand.
        sha256: Its checksum; None where its authors name none.
    """

    origin: str
    licence: str
    url: str | None = None
    sha256: str | None = None


_CONVNEXT = "https://github.com/facebookresearch/ConvNeXt"
_FILES = "https://dl.fbaipublicfiles.com/convnext"
_WTCONV = "https://github.com/BGU-CS-VIL/WTConv, by its link to a folder of Google Drive"

PUBLIC = {
    "convnext_tiny": Public(_CONVNEXT, "MIT", f"{_FILES}/convnext_tiny_1k_224_ema.pth"),
    "convnext_small": Public(_CONVNEXT, "MIT", f"{_FILES}/convnext_small_1k_224_ema.pth"),
    "convnext_base": Public(_CONVNEXT, "MIT", f"{_FILES}/convnext_base_1k_224_ema.pth"),
    "wtconvnext_tiny": Public(_WTCONV, "MIT"),
    "wtconvnext_small": Public(_WTCONV, "MIT"),
    "wtconvnext_base": Public(_WTCONV, "MIT"),
}
"""Public checkpoints by name: ImageNet-1K, 224 pixels, averaged weights."""


def from_pretrained(source: str | os.PathLike[str], *, sha256: str | None = None) -> ConvNeXt:
    """The network of a checkpoint, with its parameters.

    A public one is fetched once, into the user's folder of caches. Whatever is read runs no code.

    Args:
        source: A path that `load_network` reads, or a name of `PUBLIC`. A path that is there comes
            before a name.
        sha256: The checksum that the file must have, in hexadecimal digits.

    Raises:
        FileNotFoundError: If there is nothing at the path, or the checkpoint can only be fetched by
            hand; the message says where.
        ConnectionError: If it cannot be fetched.
        ValueError: If the checksum is another, or the file is no checkpoint of a network.

    Example:
        >>> from_pretrained("nothing.safetensors")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no file nothing.safetensors, and no public checkpoint of that name: \
convnext_tiny, convnext_small, convnext_base, wtconvnext_tiny, wtconvnext_small, wtconvnext_base
    """
    path = Path(source)
    if not path.exists():
        public = PUBLIC.get(str(source))
        if public is None:
            raise FileNotFoundError(
                f"no file {path}, and no public checkpoint of that name: {', '.join(PUBLIC)}"
            )
        path = _fetched(str(source), public)
        sha256 = sha256 or public.sha256
    if sha256 is not None:
        _check(path, sha256)
    return load_network(path)


def _fetched(name: str, public: Public) -> Path:
    """The file of a public checkpoint, fetched if it is not there."""
    if public.url is None:
        raise FileNotFoundError(
            f"{name} cannot be fetched by a program: fetch it by hand from {public.origin}, and "
            "give its path"
        )
    folder = Path(platformdirs.user_cache_dir("flash_wtconv")) / "checkpoints"
    path = folder / public.url.rpartition("/")[2]
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(public.url, timeout=_TIMEOUT) as answer,
            replacing(path, force=True) as temporary,
            temporary.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file, _BLOCK)
            wanted = answer.headers.get("Content-Length")
            if wanted is not None and file.tell() != int(wanted):
                raise ConnectionError(f"it ended after {file.tell()} of {wanted} bytes")
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(
            f"{name} cannot be fetched from {public.url}: {reason}. Without a network, copy the "
            f"file to {path}, or give its path"
        ) from error
    _log.info("fetched %s; its sha256 is %s", path, _digest(path))
    return path


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"sha256 is that of one file, and {path} is a folder")
    found = _digest(path)
    if found != sha256.lower():
        raise ValueError(f"{path} has the sha256 {found}, expected {sha256.lower()}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
