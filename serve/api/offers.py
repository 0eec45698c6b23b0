"""What a server offers from its start: adapters of vLLM's command line, configured, saved and watched experts."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.api.keepalive import keep_alive
from deltamux.serve.api.saved import SavedExperts
from deltamux.serve.api.watch import Watch
from deltamux.serve.settings import PluginSettings

# Tasks that run as long as the server; asyncio itself keeps no reference to a task.
_running: set[asyncio.Task[None]] = set()


async def offer_all(
    settings: PluginSettings, registry: ExpertRegistry, saved: SavedExperts
) -> None:
    """Offer everything, and keep watching what changes by itself."""
    await registry.adopt()
    for expert in settings.experts:
        await registry.offer(expert, settings.preloads(expert.name))
    for expert in saved.read():
        if registry.get(expert.name) is None:
            await registry.offer(expert, preload=False, origin="added")
    if settings.experts_dir is not None:
        watch = Watch(settings.experts_dir, registry)
        await watch.look(at_start=True)
        _go_on(watch.run())
    _go_on(keep_alive(registry))


def _go_on(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
