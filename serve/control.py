"""How the API server asks the engine's worker to move experts, past the engine's loop.

A Unix socket in the status folder, served by threads of the worker. A request through vLLM's own calls would
wait for the running step and keep the next one waiting. One connection carries one order, a line of JSON, and
one reply:

    {"order": "load", "expert_id": 3, "name": …, "path": …}      →  {"seconds": 0.41}
    {"order": "enter", …, "keep": [1, 2], "number": 7}            →  {"seconds": 0.01}, or {"error": …}

Where several workers share the model (tensor parallelism), each has a socket and gets every order.
Orders are carried out side by side, and one may wait for a load while later ones are done: whose slots are needed
is what the order with the highest number said, for all that are still under way.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deltamux.serve.status import status_directory

# Of each rank's worker.
SOCKET = "worker-{rank}.sock"
LONGEST_LINE = 2**20


class Order(BaseModel):
    """What the worker is to do with an expert.

    Attributes:
        order: `check` looks whether it could be loaded, `load` brings it into the host cache, `enter` into a slot,
            `pin` keeps it there, `unpin` no longer does, `leave` frees slot and host memory, `remove` forgets it.
        expert_id: vLLM's LoRA id.
        name: What vLLM calls it.
        path: Its directory, with the hash of its content.
        keep: Of `enter` and `pin`: experts whose slots are needed by requests that run.
        number: Of the order, ascending.
    """

    model_config = ConfigDict(extra="forbid")

    order: Literal["check", "load", "enter", "pin", "unpin", "leave", "remove"]
    expert_id: Annotated[int, Field(gt=0)]
    name: str = ""
    path: str = ""
    keep: list[int] = []
    number: Annotated[int, Field(ge=0)] = 0


def socket_path(rank: int) -> Path:
    """Where a rank's worker listens."""
    return status_directory() / SOCKET.format(rank=rank)


def encode(message: dict[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"
