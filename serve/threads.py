"""The threads of the engine's process: one that dies takes the process along.

vLLM's engine talks to the API server through two threads. One that raises is simply gone: requests wait for ever, while
the engine idles and `/health` is green. Here its end ends the process, which the API server notices at once: requests
fail, `/health` and `/v1/ready` say so, and the server exits with an error, for whoever watches it to start it again.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from deltamux.serve import compat

logger = logging.getLogger("vllm.deltamux")

# As Python itself exits with an error that nobody caught.
EXIT_STATUS = 1


def watch_threads() -> None:
    """Wrap what the engine runs in threads; a second call does nothing."""
    process = compat.symbol(*compat.ENGINE_PROCESS)
    for name in compat.ENGINE_THREADS:
        method = getattr(process, name)
        if not hasattr(method, "deltamux"):
            setattr(process, name, _watched(method))


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception:
            logger.exception(
                "deltamux: the engine's thread %s died; so ends the engine", method.__name__
            )
            # Only this ends a process from a thread; there is nothing left that could clean up.
            os._exit(EXIT_STATUS)

    watched.deltamux = True  # type: ignore[attr-defined]
    return watched
