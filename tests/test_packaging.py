"""How the three folders become one importable distribution."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

from typer.testing import CliRunner

from deltamux.serve.cli import app

ROOT = Path(__file__).parent.parent
PACKAGES = {"compression", "router", "serve"}


def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_declared_packages_are_the_folders_with_code() -> None:
    setuptools = pyproject()["tool"]["setuptools"]  # type: ignore[index]
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "benchmarks"}
    assert set(setuptools["package-dir"].values()) == PACKAGES == folders
    rooms = {path.parent for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    names = {".".join(("deltamux", *room.relative_to(ROOT).parts)) for room in rooms}
    assert set(setuptools["packages"]) == names


def test_no_folder_is_a_bare_package() -> None:
    folders = (*PACKAGES, "tests", "benchmarks")
    assert not [path for folder in folders for path in (ROOT / folder).rglob("__init__.py")]


def test_every_entry_point_loads() -> None:
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins", "console_scripts")
    found = [e for group in groups for e in entry_points(group=group, name="deltamux")]
    assert len(found) == len(groups)
    assert all(callable(entry.load()) for entry in found)


def test_the_command_says_its_versions() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert f"deltamux {version('deltamux')}" in shown.stdout.splitlines()
    assert f"torch {version('torch')}" in shown.stdout.splitlines()


def test_the_wheel_holds_the_packages_and_their_data_under_one_root(tmp_path: Path) -> None:
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", *build, "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"deltamux"}
    assert {
        "deltamux/compression/streaming/calibration.jsonl",
        "deltamux/router/decide/wordpiece.txt",
        *(f"deltamux/serve/console/{each.name}" for each in (ROOT / "serve/console").iterdir()),
    } <= set(names)
    assert {f"deltamux/{package}/py.typed" for package in PACKAGES} <= set(names)
    assert not [name for name in names if "test" in name]
    # The compiled parts are there, their sources are not.
    compiled = {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}
    assert compiled == {"_feedback", "_product", "_unpack"}
    assert not [name for name in names if name.endswith((".cpp", ".h"))]


def test_compression_and_router_do_not_import_vllm() -> None:
    code = (
        "import sys, deltamux.compression.commands, deltamux.router.commands;"
        "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"
