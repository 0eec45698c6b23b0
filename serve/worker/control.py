"""The worker's end of the control socket: each order in a thread of its own (see `serve/control.py`)."""

import logging
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from deltamux.compression.validation import problems
from deltamux.serve.control import LONGEST_LINE, Order, encode, socket_path
from deltamux.serve.worker.residency import Residency
from deltamux.serve.worker.table import Wanted

logger = logging.getLogger("vllm.deltamux")


class _Server(socketserver.ThreadingUnixStreamServer):
    """Threads end with the process, and no order is refused because others wait."""

    daemon_threads = True
    request_queue_size = 128
    residency: Residency
    check: Callable[[str], None]


class _Connection(socketserver.StreamRequestHandler):
    """One order and its reply."""

    server: _Server

    def handle(self) -> None:
        """Carry out the order; whatever is wrong with it is the reply."""
        start = time.monotonic()
        try:
            carry_out(self.server.residency, self.server.check, self.rfile.readline(LONGEST_LINE))
            reply: dict[str, Any] = {"seconds": time.monotonic() - start}
        except ValueError as error:
            reply = {"error": str(error)}
        except Exception as error:
            logger.exception("deltamux: an order failed")
            reply = {"error": f"{type(error).__name__}: {error}"}
        try:
            self.wfile.write(encode(reply))
        except OSError:
            return  # who asked has gone; the expert stays where it was brought


def carry_out(residency: Residency, check: Callable[[str], None], line: bytes) -> None:
    """Do what an order says.

    Raises:
        ValueError: It is none, or it cannot be done; the message says why.
    """
    try:
        order = Order.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(f"not an order: {problems(error)}") from error
    wanted = Wanted(order.expert_id, order.name, order.path)
    match order.order:
        case "check":
            check(order.path)
        case "load":
            residency.load(wanted)
        case "enter" | "pin":
            residency.need(order.keep, order.number)
            residency.enter(wanted, pin=order.order == "pin")
        case "unpin":
            residency.unpin(order.expert_id)
        case "leave":
            residency.leave(order.expert_id)
        case "remove":
            residency.remove(order.expert_id)


def listen(residency: Residency, check: Callable[[str], None], rank: int) -> None:
    """Take orders from now on.

    Args:
        residency: Who carries them out.
        check: Looks whether the expert of a path could be loaded; raises ValueError.
        rank: This worker's among those that share the model.
    """
    path = socket_path(rank)
    path.unlink(missing_ok=True)
    server = _Server(str(path), _Connection)
    server.residency, server.check = residency, check
    threading.Thread(target=server.serve_forever, name="deltamux-control", daemon=True).start()
