"""What a fleet is to do: `fleet.yaml`. What each replica serves stands in its `deltamux.yaml`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deltamux.serve.durations import Duration
from deltamux.serve.fleet.placement import DEFAULT_BOUND, DEFAULT_ROOM
from deltamux.serve.fleet.yaml_files import loaded

WHAT = "a fleet's configuration"

Count = Annotated[int, Field(ge=1)]


class FleetSettings(BaseModel):
    """`fleet.yaml`; paths in it are relative to its folder.

    Attributes:
        version: Of the configuration.
        server: `deltamux.yaml`, what each replica serves.
        host: Where the fleet's endpoint listens.
        port: Its port.
        replicas: How many there are from the start, and at least.
        most_replicas: How many there may be; None: no more.
        gpus: GPUs of a replica.
        placement: `affinity`, or `round_robin` for comparison.
        bound: A replica's open requests, to the mean.
        room: Open requests that a replica takes in any case.
        patience: How long a request waits for a replica that can answer.
        queue: Waiting requests of a replica above which another one is started.
        swaps: Swaps a request above which another replica is started.
        up_after: How long that must last.
        down_after: How long little load must last before a replica is ended.
        state: A file in which experts that clients added or removed are kept over a restart; None: they are not.
        ray: Address of a Ray cluster; None: one is started on this machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    server: Path
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Count = 2
    most_replicas: Count | None = None
    gpus: Annotated[float, Field(ge=0)] = 0.0
    placement: Literal["affinity", "round_robin"] = "affinity"
    bound: Annotated[float, Field(ge=1)] = DEFAULT_BOUND
    room: Count = DEFAULT_ROOM
    patience: Duration = 60.0
    queue: Annotated[float, Field(gt=0)] = 4.0
    swaps: Annotated[float, Field(gt=0)] = 0.5
    up_after: Duration = 30.0
    down_after: Duration = 600.0
    state: Path | None = None
    ray: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "FleetSettings":
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(
                f"most_replicas is {self.most_replicas}, fewer than replicas, {self.replicas}"
            )
        return self


def load_fleet(path: Path) -> FleetSettings:
    """Read `fleet.yaml`; raises as `loaded`."""
    settings = loaded(FleetSettings, path, WHAT)
    root = path.parent.absolute()
    state = settings.state and root / settings.state.expanduser()
    server = root / settings.server.expanduser()
    return settings.model_copy(update={"server": server, "state": state})
