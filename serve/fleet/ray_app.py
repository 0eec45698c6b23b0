"""The fleet on Ray Serve: who starts replicas, starts them again, and decides how many there are.

    deployment `front`      the endpoint behind Ray's proxy (`front.py`)
    deployment `replica`    one server each (`replica.py`), in a process of its own beside Ray's
    actor `roster`          who is there and what was changed (`roster.py`)

Requests go from the front to the servers by HTTP, not through Ray: which replica answers is the front's choice, and a stream
stays a stream. Ray asks each replica for its health every second and starts another in the place of one that has ended.
"""

import asyncio
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from deltamux.serve.fleet.front import Front
from deltamux.serve.fleet.replica import ReplicaServer
from deltamux.serve.fleet.roster import Change, Known, Roster
from deltamux.serve.fleet.scaling import QUEUE, SWAPS, Policy, policy_arguments
from deltamux.serve.fleet.settings import FleetSettings

NAME, ROSTER, NAMESPACE = "deltamux", "deltamux-roster", "deltamux"
# Ray's shared memory, which nothing of a fleet uses: the least that it takes.
STORE_BYTES = 100 * 2**20
HEALTH_SECONDS, HEALTH_TIMEOUT, STOP_SECONDS = 1.0, 30.0, 60.0
OPEN_REQUESTS = 100_000


class RayRoster:
    """The roster from another process."""

    def __init__(self) -> None:
        self._actor: Any = None

    def _found(self) -> Any:
        self._actor = self._actor or ray.get_actor(ROSTER, NAMESPACE)
        return self._actor

    async def known(self) -> Known:
        """What is known now."""
        known: Known = await self._found().known.remote()
        return known

    async def note(self, change: Change) -> None:
        """Keep a change."""
        await self._found().note.remote(change)


@dataclass(frozen=True)
class Order:
    """What a replica is started with."""

    config: Path
    is_local: bool
    key: str | None


class Replica:
    """A deployment's replica: keeps one server running and its seat taken."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._identity = serve.get_replica_context().replica_id.unique_id
        self._roster = ray.get_actor(ROSTER, NAMESPACE)
        host = "127.0.0.1" if order.is_local else ray.util.get_node_ip_address()
        self._server = ReplicaServer(order.config, host)
        try:
            self._server.wait()
            ray.get(self._roster.join.remote(self._identity, self._server.url))
        except BaseException:
            self._server.stop()
            raise

    async def check_health(self) -> None:
        """Asked by Ray.

        Raises:
            RuntimeError: The server has ended; Ray starts another replica.
        """
        if await asyncio.to_thread(self._server.healthy):
            await self._roster.join.remote(self._identity, self._server.url)
            return
        if self._server.process.poll() is None:
            return  # it may be busy, and the front asks it for itself
        await self._leave()
        await asyncio.to_thread(self._server.stop)
        raise RuntimeError(f"the server ended with {self._server.process.returncode}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray: what the policy decides by."""
        try:
            queue, swaps = await asyncio.to_thread(self._server.load, self._order.key)
        except Exception:
            return {}  # it does not answer now; its health is asked elsewhere
        return {QUEUE: queue, SWAPS: swaps}

    async def __del__(self) -> None:
        """Called by Ray before the replica ends."""
        await self._leave()
        await asyncio.to_thread(self._server.stop)

    async def _leave(self) -> None:
        with suppress(ray.exceptions.RayActorError):
            await self._roster.leave.remote(self._identity)


def application(settings: FleetSettings, key: str | None) -> Any:
    """The two deployments."""

    def build() -> Any:
        return Front(settings, RayRoster(), key).app

    class Endpoint:
        def __init__(self, replicas: Any) -> None:
            self._replicas = replicas

    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    front = serve.deployment(
        name="front",
        num_replicas=1,
        max_ongoing_requests=OPEN_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        logging_config=quiet,
    )(serve.ingress(build)(Endpoint))
    order = Order(settings.server, settings.ray is None, key)
    replicas = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": 0, "num_gpus": settings.gpus},
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        logging_config=quiet,
        **_how_many(settings),
    )(Replica)
    return front.bind(replicas.bind(order))


def _how_many(settings: FleetSettings) -> dict[str, Any]:
    most = settings.most_replicas
    if most is None or most == settings.replicas:
        return {"num_replicas": settings.replicas}
    policy = AutoscalingPolicy(policy_function=Policy, policy_kwargs=policy_arguments(settings))
    scaling = AutoscalingConfig(
        min_replicas=settings.replicas,
        max_replicas=most,
        upscale_delay_s=settings.up_after,
        downscale_delay_s=settings.down_after,
        policy=policy,
    )
    return {"autoscaling_config": scaling}


def run(settings: FleetSettings, key: str | None) -> None:
    """Serve until SIGTERM or SIGINT; then let requests end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ended = threading.Event()
    local = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    ray.init(
        address=settings.ray, namespace=NAMESPACE, **({} if settings.ray is not None else local)
    )
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: ended.set())
    roster = ray.remote(num_cpus=0, max_restarts=-1)(Roster)
    # It lives as long as somebody here holds it.
    held = [roster.options(name=ROSTER, get_if_exists=True).remote(settings.state)]
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application(settings, key), name=NAME, route_prefix="/")
        print(f"the fleet answers at http://{settings.host}:{settings.port}", flush=True)  # noqa: T201
        ended.wait()
    finally:
        serve.shutdown()
        held.clear()
        ray.shutdown()
