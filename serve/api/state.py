"""What deltamux keeps on the server's `app.state`, under one attribute and with types."""

from dataclasses import dataclass
from typing import Any

from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.observability.journal import Journal
from deltamux.serve.settings import PluginSettings

ATTRIBUTE = "deltamux"


@dataclass(frozen=True)
class ServerState:
    """The parts that HTTP routes read.

    Attributes:
        settings: What was configured.
        registry: The experts on offer.
        route: Who answers `auto`.
        journal: Requests in flight.
        engine: vLLM's engine client.
        slots: How many experts are on the device at one time.
    """

    settings: PluginSettings
    registry: ExpertRegistry
    route: AutoRoute
    journal: Journal
    engine: Any
    slots: int

    def attach(self, state: Any) -> None:
        """Put it on an application's state."""
        setattr(state, ATTRIBUTE, self)


def server_state(request: Any) -> ServerState:
    """The state of the server that got a request."""
    found: ServerState = getattr(request.app.state, ATTRIBUTE)
    return found
