"""Where experts and routers that a client names may lie.

A client that may load experts makes the server open what it names. It shall not reach past the folders that were
configured for it: neither by a path, nor by a link, be it the directory or a file in it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from deltamux.compression.checkpoint.checkpoint import SIDE_FILES
from deltamux.compression.image import adapter
from deltamux.compression.names import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from deltamux.router.decide.artifact import ARTIFACT_FILES
from deltamux.serve.settings import HUB_ID

# All that is opened in such a directory.
FILES = (
    *(WEIGHTS_FILE, MANIFEST_FILE, CONFIG_FILE),
    *(adapter.CONFIG_FILE, adapter.WEIGHTS_FILE),
    *SIDE_FILES,
    *sorted(ARTIFACT_FILES),
)


class Roots:
    """The folders.

    Args:
        folders: Links in them are resolved.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = sorted({folder.resolve() for folder in folders})

    def inside(self, path: Path) -> Path:
        """A directory that a client named, its links resolved; a hub id, where the hub's cache lies under a root.

        Raises:
            ValueError: It is relative, or it or a file in it lies elsewhere. Nothing is said of what is there.
        """
        if not path.is_absolute() and re.fullmatch(HUB_ID, str(path)):
            self._resolved(Path(HF_HUB_CACHE))
            return path
        if not path.is_absolute() or "\0" in str(path):
            raise ValueError(
                f"{str(path)!r} is relative, and the server's folder and home are not the client's: "
                "give an absolute path"
            )
        found = self._resolved(path)
        for name in FILES:
            self._resolved(found / name)
        return found

    def _resolved(self, path: Path) -> Path:
        try:
            found = path.resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{str(path)!r} leads nowhere: {error}") from error
        if not any(found.is_relative_to(folder) for folder in self._folders):
            raise ValueError(
                f"{str(path)!r} is in none of the folders that experts and routers are loaded from "
                f"({', '.join(map(str, self._folders)) or 'there are none'}): move it there, or name its "
                "folder under `roots` in the configuration"
            )
        return found
