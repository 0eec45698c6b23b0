"""What the user is told of an error, and which errors keep their traceback."""

import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import safetensors
import torch

from deltamux.serve.compat import VllmError
from deltamux.serve.errors import TRACEBACK_VARIABLE, one_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("slots must be 1 or more,\n  got 0"), "slots must be 1 or more, got 0"),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "'a/b': no such file or directory",
        ),
        (OSError("the hub does not answer"), "the hub does not answer"),
        (ConnectionError(), "ConnectionError"),
        (safetensors.SafetensorError("header too large"), "header too large"),
        (jinja2.TemplateSyntaxError("unexpected '%'", 3), "unexpected '%' line 3"),
        (torch.OutOfMemoryError("tried to allocate 20 GiB"), "tried to allocate 20 GiB"),
        (VllmError("vLLM is not installed"), "vLLM is not installed"),
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn.linear_model"),
            "'sklearn' is not installed: pip install 'deltamux[router]'",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(error: Exception, said: str) -> None:
    assert one_line(error) == said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("weight"),
        TypeError("unsupported operand"),
        ModuleNotFoundError("No module named 'deltamux.nothing'", name="deltamux.nothing"),
    ],
)
def test_what_nobody_foresaw_keeps_its_traceback(error: Exception) -> None:
    assert one_line(error) is None


def test_tracebacks_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    assert one_line(ValueError("no")) is None
    monkeypatch.setenv(TRACEBACK_VARIABLE, "0")
    assert one_line(ValueError("no")) == "no"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nothing"], "nothing"),
        (["merge", "a", "b", "-o", "c", "--dtype", "int3"], "got 'int3'"),
        (["route", "hello", "--router", "nothing"], "nothing"),
        (["serve", "nothing.yaml"], "'nothing.yaml' is not a file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_command_ends_with_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deltamux.serve", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
