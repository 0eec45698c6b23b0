"""Files and folders that are written: with what is missing, in one line, where there is no room or no right to."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from deltamux.compression.errors import naming


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that other users may read, such as a container's.

    safetensors itself gives it to its owner alone, whatever the umask.
    """
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with naming(path, f"{needed:,} bytes are needed there"):
        save_file(tensors, path, metadata=metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def save_text(text: str, path: Path) -> None:
    """Write a text file.

    Raises:
        ValueError: There is no room for it, or no right to.
    """
    content = text.encode()
    with naming(path, f"{len(content):,} bytes are needed there"):
        path.write_bytes(content)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is in.

    Raises:
        ValueError: It cannot be made.
    """
    with naming(path, "name a folder that can be written to"):
        path.mkdir(parents=True, exist_ok=True)
