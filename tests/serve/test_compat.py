"""The vLLM that is installed, and the one symbol that is replaced in it."""

import subprocess
import sys

import pytest
from packaging.version import Version

from deltamux.serve import compat, plugin

pytestmark = pytest.mark.vllm


def test_the_installed_vllm_is_in_the_window() -> None:
    assert compat.OLDEST <= compat.vllm_version() < compat.BEFORE


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0"])
def test_a_vllm_outside_the_window_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: Version(version))
    with pytest.raises(RuntimeError, match=rf"supports vLLM >=0.26,<0.34; {version} is installed"):
        compat.check_vllm()


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(RuntimeError, match="unset VLLM_USE_RUST_FRONTEND"):
        compat.check_vllm()


def test_a_symbol_that_is_gone_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"has no json\.nothing_here"):
        compat.symbol("json", "nothing_here")


class Engine:
    """An engine client without pins."""

    def __getattr__(self, name: str) -> object:
        if name == "reset_prefix_cache":
            raise AttributeError(name)
        return object()


def test_an_engine_client_without_a_method_is_refused_by_its_name() -> None:
    with pytest.raises(compat.VllmError, match=r"Engine of vLLM .* has no 'reset_prefix_cache'"):
        compat.check_server(Engine(), object())


PROBE = """
import os, sys
os.environ["VLLM_PLUGINS"] = sys.argv[1]
from deltamux.serve.plugin import register
register(); register()
from vllm.v1.worker import lora_model_runner_mixin
print(lora_model_runner_mixin.LRUCacheWorkerLoRAManager.__module__)
"""


@pytest.mark.parametrize(
    ("plugins", "module"),
    [("deltamux", "deltamux.serve.worker.manager"), ("other", "vllm.lora.worker_manager")],
)
def test_the_manager_is_replaced_only_where_deltamux_is_asked_for(
    plugins: str, module: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE, plugins],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split()[-1:] == [module], done.stderr


def test_an_installed_but_unnamed_plugin_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(compat, "check_vllm", lambda: pytest.fail("must not be reached"))
    plugin.register()
