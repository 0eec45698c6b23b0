"""How a server ends whose engine has died: soon, and with an error.

vLLM's API server ends by itself within seconds of its engine's death, but with status 0, which whoever watches it takes
for an end that was asked for.
"""

import atexit
import logging
import os
import sys
from typing import Any

logger = logging.getLogger("vllm.deltamux")

EXIT_STATUS = 1


def engine_died(engine: Any) -> bool:
    """Whether the engine's process ended without being asked to.

    A server that is asked to end stops the client first, so that `errored` is true there too.
    """
    resources = getattr(getattr(engine, "engine_core", None), "resources", None)
    return bool(getattr(resources, "engine_dead", False))


def end_with_error(engine: Any) -> None:
    """Let this process end with an error where its engine has died."""

    def check() -> None:
        if engine_died(engine):
            logger.error("deltamux: the engine died: the server ends with status %d", EXIT_STATUS)
            sys.stdout.flush()
            sys.stderr.flush()
            # The status is settled when handlers of an exit run; only this changes it.
            os._exit(EXIT_STATUS)

    atexit.register(check)
