"""A thread of the engine that dies takes its process along."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from deltamux.serve import compat
from deltamux.serve.api.liveness import Ending
from deltamux.serve.threads import watch_threads

pytestmark = pytest.mark.vllm

# The process idles, as an engine does that waits for requests: only the thread can end it.
PROGRAM = """
import threading, time
from deltamux.serve.threads import _watched

def process_input_sockets():
    raise ValueError("Expected `int`, got `float`")

threading.Thread(target=_watched(process_input_sockets), daemon=True).start()
time.sleep(600)
"""


def test_the_process_ends_with_an_error_and_says_which_thread_it_was() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 1
    assert "the engine's thread process_input_sockets died" in ended.stderr
    assert "Expected `int`, got `float`" in ended.stderr


def test_vllm_s_threads_are_watched_once() -> None:
    watch_threads()
    process = compat.symbol(*compat.ENGINE_PROCESS)
    methods = [getattr(process, name) for name in compat.ENGINE_THREADS]
    assert all(method.deltamux for method in methods)
    watch_threads()
    assert [getattr(process, name) for name in compat.ENGINE_THREADS] == methods


@pytest.mark.parametrize("dies_first", [True, False])
def test_an_engine_that_was_asked_to_end_did_not_die(dies_first: bool) -> None:
    resources = SimpleNamespace(engine_dead=False)

    def stop(timeout: float) -> None:
        resources.engine_dead = True

    engine = SimpleNamespace(engine_core=SimpleNamespace(resources=resources), shutdown=stop)
    ending = Ending(engine)
    assert not ending.engine_died
    resources.engine_dead = dies_first
    engine.shutdown(timeout=0.0)
    assert ending.engine_died == dies_first
