"""How a server ends whose engine has died: soon, and with an error.

vLLM's API server ends by itself within seconds of its engine's death, but with status 0, which whoever watches it takes
for an end that was asked for.
"""

import atexit
import functools
import logging
import os
import sys
from typing import Any

logger = logging.getLogger("vllm.deltamux")

EXIT_STATUS = 1


class Ending:
    """What is known of the end of a server.

    Args:
        engine: vLLM's engine client; its `shutdown` is watched.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # Whether the engine was alive when it was asked to end: then it did not die.
        self.asked = False
        stop = engine.shutdown

        @functools.wraps(stop)
        def shutdown(*args: Any, **kwargs: Any) -> Any:
            self.asked = self.asked or not self._gone()
            return stop(*args, **kwargs)

        engine.shutdown = shutdown

    @property
    def engine_died(self) -> bool:
        """Whether the engine ended without being asked to."""
        return self._gone() and not self.asked

    def _gone(self) -> bool:
        resources = getattr(getattr(self._engine, "engine_core", None), "resources", None)
        return bool(getattr(resources, "engine_dead", False))


def end_with_error(engine: Any) -> None:
    """Let this process end with an error where its engine dies."""
    ending = Ending(engine)

    def check() -> None:
        if ending.engine_died:
            logger.error("deltamux: the engine died: the server ends with status %d", EXIT_STATUS)
            sys.stdout.flush()
            sys.stderr.flush()
            # The status is settled when handlers of an exit run; only this changes it.
            os._exit(EXIT_STATUS)

    atexit.register(check)
