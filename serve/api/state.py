"""What deltamux keeps on the server's `app.state`, under one attribute and with types."""

from dataclasses import dataclass
from typing import Any

from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.api.guard import Doors
from deltamux.serve.api.owners import Owners
from deltamux.serve.api.roots import Roots
from deltamux.serve.api.saved import SavedExperts
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
        owners: Whose each response is.
        doors: Whose keys open what.
        roots: Where experts and routers that a client names may lie.
        saved: Experts that are kept over a restart.
    """

    settings: PluginSettings
    registry: ExpertRegistry
    route: AutoRoute
    journal: Journal
    engine: Any
    owners: Owners
    doors: Doors
    roots: Roots
    saved: SavedExperts

    def attach(self, state: Any) -> None:
        """Put it on an application's state."""
        setattr(state, ATTRIBUTE, self)


def server_state(request: Any) -> ServerState:
    """The state of the server that got a request."""
    found: ServerState = getattr(request.app.state, ATTRIBUTE)
    return found
