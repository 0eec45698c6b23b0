"""Atheris, which looks for inputs that reach new code: streams of codes, manifests and settings.

    python tests/fuzz_coverage.py streams|manifests|settings [-runs=100000]        (`make fuzz` does, if atheris is there)

It ends with the first input that is neither read nor refused in a line.
"""

import json
import os
import sys
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["deltamux.compression"]):
    from deltamux.compression.artifact import entropy, manifest, run_lengths
    from deltamux.compression.checkpoint import settings
    from deltamux.compression.image import unpack

import torch

GOLDEN = Path(__file__).parent / "compression" / "golden" / "format_1" / "coded"
FOLDER = Path(tempfile.mkdtemp())


def streams(data: bytes) -> None:
    """What stands under the deflate code of a stream."""
    if len(data) < 4:
        return
    rows, columns, levels = data[0] % 64 + 1, data[1] % 64 + 1, data[2] % 255 + 2
    content = torch.frombuffer(bytearray(data[3:]), dtype=torch.uint8)
    try:
        found = entropy._parsed(content.numpy(), levels, (rows, columns))
    except ValueError:
        return
    assert sum(alphabet.length for alphabet in found.alphabets) == len(found.symbols)
    for alphabet in found.alphabets:
        try:
            codes = run_lengths.from_symbols(found.symbols[: alphabet.length], alphabet, rows)
        except ValueError:
            continue
        assert codes.max(initial=0) < levels


def manifests(data: bytes) -> None:
    """The text of a manifest."""
    (FOLDER / "delta_config.json").write_bytes(data)
    with suppress(ValueError):
        manifest.read_manifest(FOLDER)


def generation(data: bytes) -> None:
    """The text of each file of settings."""
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        (FOLDER / name).write_bytes(data)
        with suppress(ValueError):
            settings.read_side_settings(FOLDER, 272, {"x": 1}.get)
        (FOLDER / name).unlink()


def seeds() -> str:
    """A folder with valid inputs to begin with."""
    folder = FOLDER / "seeds"
    folder.mkdir()
    for name in ("delta_config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((GOLDEN / name).read_bytes())
    (folder / "empty").write_text(json.dumps({}))
    for rows, columns, levels in ((1, 1, 2), (16, 30, 16), (40, 7, 256)):
        codes = torch.randint(0, levels, (rows, columns), dtype=torch.int32).to(torch.uint8)
        stream = zlib.decompress(entropy.deflate(codes).numpy().tobytes(), -zlib.MAX_WBITS)
        head = bytes([rows - 1, columns - 1, levels - 2])
        (folder / f"stream{rows}").write_bytes(head + stream)
    return os.fspath(folder)


def main() -> None:
    target = {"streams": streams, "manifests": manifests, "settings": generation}[sys.argv[1]]
    unpack.library()
    atheris.Setup([sys.argv[0], *sys.argv[2:], seeds()], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
