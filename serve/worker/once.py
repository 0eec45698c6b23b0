"""Work that several threads want at the same time is done once."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock


class Once:
    """Runs each key's work in the first thread that asks; the others wait for it, and fail as it does."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: dict[Hashable, Future[None]] = {}

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work, or wait until another thread has done it.

        Raises:
            Exception: What the work raised, in every thread that wanted it.
        """
        with self._lock:
            under_way = self._running.get(key)
            self._running.setdefault(key, Future())
        if under_way is not None:
            under_way.result()
            return
        try:
            work()
        except BaseException as error:
            self._take(key).set_exception(error)
            raise
        self._take(key).set_result(None)

    def _take(self, key: Hashable) -> Future[None]:
        with self._lock:
            return self._running.pop(key)
