"""Networks that measure: their weights in their libraries' own caches, what to do where they are not, and full precision."""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError

from ..errors import UserError


@contextmanager
def from_hub(what: str, repository: str, file: str = "") -> Iterator[None]:
    """Around whatever fetches a repository of the hub, or a folder, for `what`.

    Raises:
        UserError: it is neither in the cache nor can it be fetched; names the command and the folder.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        why = textwrap.shorten(str(error), 160, placeholder=" ...")
        if Path(repository).exists():
            raise UserError(f"{what}: {repository} cannot be read ({why}); save the model there again") from error
        raise UserError(
            f"{what} needs the weights {repository}{file and '/' + file}, which cannot be had from here ({why}); "
            f"where there is internet run: hf download {repository}{file and ' ' + file}, and copy its folder "
            f"models--{repository.replace('/', '--')} into {HF_HUB_CACHE} of this machine"
        ) from error


def hub_state(what: str, repository: str, file: str) -> dict[str, Any]:
    """A pickled state of the hub, on the CPU; only tensors and plain values are unpickled."""
    with from_hub(what, repository, file):
        path = hf_hub_download(repository, file)
    return read_state(what, Path(path))


def url_file(what: str, url: str) -> Path:
    """A weights file that torch.hub keeps; it is downloaded if it is not there, and its hash compared with its name.

    Raises:
        UserError: it cannot be downloaded; names the file and where to place it.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{what} needs the weights {path.name}, which cannot be downloaded from here ({error}); "
                f"fetch {url} where there is internet, and place it at {path}"
            ) from error
    read_state(what, path)
    return path


def read_state(what: str, path: Path) -> dict[str, Any]:
    """The state in a file of PyTorch; no code of the file's is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{what}: the weights {path} cannot be read; delete the file, and fetch it again") from error


@contextmanager
def exact() -> Iterator[None]:
    """Networks run without gradients and in full float32: by default convolutions on newer GPUs round to 10 bits (TF32)."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
