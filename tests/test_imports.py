"""Which part may import which, and what a command loads before it has anything to do.

The direction of imports follows phases and processes: compression and router are made offline and know
nothing of the server; inside the server the engine's worker and the API process meet in names, status
and settings alone (docs/architecture.md).
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Packages and modules, each with what it must not import.
FORBIDDEN = {
    "compression": ("deltamux.router", "deltamux.serve", "vllm"),
    "router": ("deltamux.compression", "deltamux.serve", "vllm"),
    "router/decide": ("deltamux.router.fit", "deltamux.router.report", "sklearn"),
    "serve/worker": (
        "deltamux.router",
        "deltamux.serve.api",
        "deltamux.serve.observability",
        "deltamux.serve.endpoint",
    ),
    "serve/api": ("deltamux.serve.worker", "deltamux.serve.endpoint"),
    "serve/observability": ("deltamux.serve.worker", "deltamux.serve.endpoint"),
    "serve/fleet": ("deltamux.serve.worker", "deltamux.serve.endpoint", "vllm"),
    "serve/names.py": ("deltamux", "vllm", "pydantic"),
    "serve/status.py": ("deltamux", "vllm"),
    "serve/settings.py": ("deltamux.serve.worker", "deltamux.serve.api", "vllm"),
}
# The demo is a leaf: only the command line, which starts it, imports it.
DEMO, ITS_CALLER = "deltamux.serve.demo", ROOT / "serve" / "cli.py"
# Slow to load, and of no use to a command that has nothing to do yet.
HEAVY = ("torch", "sklearn", "scipy", "httpx", "transformers", "vllm", "matplotlib", "ray")


def sources(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; for `from a import b` also `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_in_one_direction(part: str) -> None:
    assert sources(part)
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(part)
        for name in imported(path)
        if any(inside(name, package) for package in FORBIDDEN[part])
    }
    assert not wrong


def test_nothing_but_the_command_line_imports_the_demo() -> None:
    callers = {
        path
        for part in ("compression", "router", "serve")
        for path in sources(part)
        if any(inside(name, DEMO) for name in imported(path))
    }
    demo = ROOT / "serve" / "demo"
    assert {path for path in callers if demo not in path.parents} == {ITS_CALLER}


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a program has loaded at its end."""
    program = (
        "import sys\n"
        f"try:\n    {code}\nexcept SystemExit as exit:\n    assert not exit.code, exit.code\n"
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_deciding_loads_numpy_and_no_more() -> None:
    assert loaded_by("import deltamux.router.decide.router") == set()


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["compress"],
        ["inspect"],
        ["merge"],
        ["evaluate"],
        ["router", "fit"],
        ["router", "evaluate"],
        ["route"],
        ["serve"],
        ["plan"],
        ["fleet"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = f"import deltamux.serve.cli as cli; sys.argv[1:] = {[*command, '--help']}; cli.app()"
    assert loaded_by(code) == set()
