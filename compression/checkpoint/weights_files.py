"""Which files of a folder hold a checkpoint's weights, and what to say where they do not.

One safetensors file, or the shards that an index names; each is looked at before it is opened.
"""

import os
from pathlib import Path
from typing import Any

from deltamux.compression.errors import naming
from deltamux.compression.files import open_tensors, read_json
from deltamux.compression.names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE


def open_safetensors(path: Path) -> Any:
    """A weights file, opened.

    Raises:
        ValueError: As `check_file`, or it is damaged.
    """
    check_file(path)
    return open_tensors(path, "fetch or save the checkpoint again")


def check_file(path: Path) -> None:
    """Refuse what is no file that can be read; a pipe or device would block or never end.

    Raises:
        ValueError: It is missing, a link to nothing, something else than a file, or not readable.
    """
    again = "fetch or save the checkpoint again"
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{str(path)!r} is a link to {str(path.readlink())!r}, which is not there: {again}"
        )
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file: {again}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{str(path)!r} is not readable for user {os.getuid()}: chmod a+r it")


def what_else(root: Path) -> str:
    """What a folder without a configuration is instead."""
    if (root / "adapter_config.json").is_file():
        return (
            "is a LoRA adapter, which needs no compression: name it under `experts` in "
            "deltamux.yaml, or merge it into its base and name that checkpoint"
        )
    inside = sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}"))
    if inside:
        return f"has no {CONFIG_FILE}, but its folder {inside[-1]!r} has one: name that one"
    return f"has no {CONFIG_FILE}: name a Hugging Face checkpoint"


def tensor_files(root: Path, source: str) -> dict[str, Path]:
    """Tensor name to file: of the single file, else of the index's shards.

    transformers takes the single file where both are there, vLLM the shards: where both are whole, neither is taken.
    """
    single, index = root / WEIGHTS_FILE, root / INDEX_FILE
    if single.exists() or single.is_symlink():
        if index.is_file():
            _refuse_both(_shards(index), single, source)
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise ValueError(f"{source!r} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{_others(root)}")
    shards = _shards(index)
    for path in sorted(set(shards.values())):
        if not path.exists() and not path.is_symlink():
            raise ValueError(f"{source!r} names the shard {path.name!r}, which is not there")
        check_file(path)
    return shards


def _shards(index: Path) -> dict[str, Path]:
    content = read_json(index)
    with naming(index, "save the checkpoint again"):
        weight_map = dict(content["weight_map"])
        names = {Path(file).name for file in weight_map.values()}
        if names != set(weight_map.values()):
            raise TypeError("its weight_map names files outside of its folder")
    return {name: index.parent / file for name, file in weight_map.items()}


def _refuse_both(shards: dict[str, Path], single: Path, source: str) -> None:
    other = {path for path in shards.values() if path != single}
    if other and all(path.is_file() for path in other):
        raise ValueError(
            f"{source!r} holds {WEIGHTS_FILE} and the shards of {INDEX_FILE}, of which one is left "
            "over from before: delete the older one"
        )


def _others(root: Path) -> str:
    """What weights a folder has instead of safetensors, and what to do about it."""
    kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.safetensors")
    found = sorted(path.name for kind in kinds for path in root.glob(kind))
    if not found:
        return ": it has no weights"
    if (root / "adapter_model.safetensors").is_file():
        return " but a LoRA adapter: merge it into its base and save the result"
    return (
        f" but {found[0]!r}: load it with transformers and write it with save_pretrained(), which "
        "saves as safetensors"
    )
