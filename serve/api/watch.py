"""A folder of experts that is watched (`experts_dir`): each complete artifact in it is served.

A directory is looked at when its files have not changed between two looks, and served when everything about it
checks out: a manifest that is there, weights with the manifest's hash. So an artifact that is being copied is
taken when it is complete and never before; what is refused is tried again when its files change. A directory that
changes is a new version of its expert, one that goes is a delete; both as by the HTTP routes.
"""

import asyncio
import logging
from pathlib import Path

from deltamux.compression.image.adapter import CONFIG_FILE
from deltamux.compression.names import MANIFEST_FILE
from deltamux.serve.api.expert import ExpertError
from deltamux.serve.api.experts import ExpertRegistry

logger = logging.getLogger("vllm.deltamux")

# Seconds between two looks. Chosen: a copied artifact is served within two of them.
INTERVAL = 1.0

# Of a directory: each file's name, size and time of change.
Signature = tuple[tuple[str, int, int], ...]


class Watch:
    """One folder.

    Args:
        folder: Where experts come and go.
        registry: Where they are offered.
    """

    def __init__(self, folder: Path, registry: ExpertRegistry) -> None:
        self._folder = folder
        self._registry = registry
        self._seen: dict[str, Signature] = {}
        self._tried: dict[str, Signature] = {}
        self._reported: dict[str, str] = {}
        self._going: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Look as long as the server runs."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self.look()
            except Exception:
                logger.exception("deltamux: %s could not be looked at", self._folder)

    async def look(self, at_start: bool = False) -> None:
        """Offer what is new and complete, and withdraw what has gone.

        Args:
            at_start: Take directories at once, without waiting for a second look.
        """
        try:
            found = await asyncio.to_thread(signatures, self._folder)
        except OSError as error:
            self._report("", f"{str(self._folder)!r} cannot be read: {error.strerror or error}")
            return
        before, self._seen = self._seen, found
        for name, signature in found.items():
            settled = at_start or before.get(name) == signature
            if settled and self._tried.get(name) != signature:
                self._tried[name] = signature
                await self._offer(name)
        for name in set(self._tried) - set(found):
            del self._tried[name]
            self._reported.pop(name, None)
            self._withdraw(name)

    async def _offer(self, name: str) -> None:
        known = self._registry.get(name)
        if known is not None and known.origin != "watched":
            self._report(name, "an expert of this name is offered already, which is not changed")
            return
        try:
            await self._registry.register(name, self._folder / name, origin="watched")
        except ExpertError as error:
            self._report(name, str(error))
            return
        self._reported.pop(name, None)
        logger.info("deltamux: %r of %s is served", name, self._folder)

    def _withdraw(self, name: str) -> None:
        expert = self._registry.get(name)
        if expert is None or expert.origin != "watched":
            return
        # Its running requests end first, which must not keep others from being looked at.
        task = asyncio.create_task(self._registry.delete(name))
        self._going.add(task)
        task.add_done_callback(self._going.discard)
        logger.info("deltamux: %r has gone from %s", name, self._folder)

    def _report(self, name: str, reason: str) -> None:
        if self._reported.get(name) != reason:
            self._reported[name] = reason
            logger.warning("deltamux: %s is not served: %s", self._folder / name, reason)


def signatures(folder: Path) -> dict[str, Signature]:
    """The candidates in a folder by name: directories with a manifest or an adapter's configuration.

    Raises:
        OSError: The folder cannot be read.
    """
    found = {}
    for directory in sorted(folder.iterdir()):
        if directory.name.startswith(".") or not directory.is_dir():
            continue
        try:
            files = [(file.name, file.stat()) for file in sorted(directory.iterdir())]
        except OSError:
            continue  # it is being moved or deleted
        if {MANIFEST_FILE, CONFIG_FILE} & {name for name, _ in files}:
            found[directory.name] = tuple(
                (name, stat.st_size, stat.st_mtime_ns) for name, stat in files
            )
    return found
