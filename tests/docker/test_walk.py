"""Dockerfile.cpu without Docker: its steps in a clean folder, as an unprivileged user, to an answer.

The file's instructions are read and carried out below a folder that stands for the image's root: paths
under /opt, /srv and /cache are mapped into it, ENV, ARG, WORKDIR and COPY are kept track of, and each RUN
goes through the same shell. Steps before USER need root and only prepare the user and Debian's packages;
of these it is checked that this machine has the packages. Ends with the image's own entry command and
health check.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltamux.serve.launch import free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
USER = 10001
KEY = "a-key"
MAPPED = ("/opt", "/srv", "/cache")


def instructions(target: str) -> list[tuple[str, str]]:
    """The instructions of one stage of Dockerfile.cpu."""
    text = re.sub(r"^#.*\n", "", (ROOT / "docker" / "Dockerfile.cpu").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    found = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line]
    begin = found.index(("FROM", f"python:3.11-slim-bookworm AS {target}"))
    end = next(i for i, (name, _) in enumerate(found) if i > begin and name == "FROM")
    return found[begin + 1 : end]


def unprivileged() -> dict[str, Any]:
    """How a child gives root up; nothing to do where the tests run without it."""
    return {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}


def system_python() -> Path:
    """A Python 3.11 that every user may run."""
    candidates = [Path("/usr/bin/python3"), Path("/usr/local/bin/python3")]
    if os.getuid() != 0:
        candidates.append(Path(sys.base_prefix) / "bin" / "python3")
    for path in candidates:
        if path.is_file():
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            if said.stdout.startswith("Python 3.11."):
                return path
    raise AssertionError("no Python 3.11 that an unprivileged user may run")


class Image:
    """The folder that stands for an image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.user = "root"
        self.folder = root
        self.commands: dict[str, list[str]] = {}
        binaries = root / "bin"
        binaries.mkdir()
        (binaries / "python3").symlink_to(system_python())
        kept = {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
        self.environment = kept | {"PATH": f"{binaries}:/usr/bin:/bin"}
        for name in ("opt/venv", "opt/src", "srv/deltamux", "cache/models", "cache/compile/home"):
            self._own(root / name)

    def _own(self, path: Path) -> None:
        path.mkdir(parents=True)
        if os.getuid() == 0:
            for each in (path, path.parent):
                os.chown(each, USER, USER)

    def inside(self, text: str) -> str:
        """A text with the image's paths mapped to the folder."""
        for prefix in MAPPED:
            text = re.sub(rf"(?<![\w.-]){prefix}(?=/)", f"{self.root}{prefix}", text)
        return text

    def run(self, command: str) -> None:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", self.inside(command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            umask=0o022,
            **unprivileged(),
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def carry_out(self, name: str, rest: str) -> None:
        match name:
            case "ENV" | "ARG":
                for part in shlex.split(rest):
                    key, value = part.split("=", 1)
                    self.environment[key] = self.inside(self._expand(value))
            case "WORKDIR":
                self.folder = Path(self.inside(rest))
                self.folder.mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = rest
            case "COPY":
                *sources, target = rest.split()
                for source in sources:
                    copy(ROOT / source, self.folder / target / ("" if target == "./" else "."))
            case "RUN" if self.user == "root":
                check_prepared(rest)
            case "RUN":
                assert self.user == f"{USER}:{USER}"
                self.run(rest)
            case "ENTRYPOINT" | "CMD":
                self.commands[name] = json.loads(rest)
            case "HEALTHCHECK":
                self.commands[name] = json.loads(rest.partition("CMD")[2])
            case "VOLUME" | "EXPOSE" | "STOPSIGNAL" | "SHELL":
                pass  # nothing to do for them here
            case _:
                raise AssertionError(f"the walk does not know {name}")

    def _expand(self, value: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda match: self.environment[match[1]], value)


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
    else:
        shutil.copy(source, target)


def check_prepared(command: str) -> None:
    """A step that needs root: its packages are on this machine, its user is the one of the walk."""
    packages = re.findall(r"--no-install-recommends ([\w+ .-]+?) +&&", command)
    for package in [name for group in packages for name in group.split()]:
        subprocess.run(["dpkg", "-s", package], check=True, capture_output=True)
    if "useradd" in command:
        assert f"--uid {USER}" in command
    assert packages or "useradd" in command


@pytest.fixture
def image(live: Any) -> Iterator[Image]:
    with tempfile.TemporaryDirectory(prefix="deltamux-image-") as name:
        Path(name).chmod(0o755)
        made = Image(Path(name))
        site = made.root / "srv" / "deltamux"
        for part in ("base", "math", "sql", "shell", "router"):
            shutil.copytree(live.folder / part, site / part)
        text = (live.folder / "deltamux.yaml").read_text()
        (site / "deltamux.yaml").write_text(text.replace("- name: broken\n  path: broken\n", ""))
        # safetensors makes files that only their owner reads; README.md says what to do.
        subprocess.run(["chmod", "-R", "a+rX", site], check=True)
        yield made


def test_the_steps_of_the_cpu_image_lead_to_a_server_that_answers(image: Image) -> None:
    seconds = {}
    for name, rest in instructions("server"):
        start = time.monotonic()
        image.carry_out(name, rest)
        if name == "RUN":
            seconds[rest[:40]] = round(time.monotonic() - start, 1)
    assert not (image.root / "opt" / "venv" / "bin" / "pytest").exists()
    check_known_vulnerabilities(image)
    port = str(free_port())
    inside = [image.inside(part) for part in image.commands["ENTRYPOINT"] + image.commands["CMD"]]
    command = [part.replace("8000", port).replace("0.0.0.0", "127.0.0.1") for part in inside]
    command[0] = str(image.root / "opt" / "venv" / "bin" / command[0])
    environment = image.environment | {
        "DELTAMUX_API_KEY": KEY,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # Without its compiled parts the package would install all the same, and be slow.
    assert list((image.root / "opt" / "venv").rglob("_product*.so"))
    log = image.root / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=image.folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **unprivileged(),
        )
    try:
        await_health(process, image, port, log)
        answer = ask_router(f"http://127.0.0.1:{port}")
        assert answer.json()["model"] == "sql"
        assert answer.headers["x-deltamux-reason"] == "router"
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    sys.stderr.write(f"seconds of the steps: {json.dumps(seconds)}\n")


def ask_router(url: str) -> httpx.Response:
    """A question that the tests' router sends to the expert for SQL."""
    message = {"role": "user", "content": "select the column of rows"}
    return httpx.post(
        f"{url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {KEY}"},
        json={"model": "auto", "messages": [message], "max_tokens": 4},
        timeout=300,
    )


def check_known_vulnerabilities(image: Image) -> None:
    """What the image installed has no vulnerability that is known and mended, as far as pip-audit can ask here."""
    tool = shutil.which("pip-audit") or str(Path(sys.executable).with_name("pip-audit"))
    if not Path(tool).is_file():
        sys.stderr.write("not audited: pip-audit is not installed\n")
        return
    (packages,) = (image.root / "opt" / "venv" / "lib").glob("python3.*/site-packages")
    done = subprocess.run(
        [tool, "--path", packages, "--format", "json", "--progress-spinner", "off"],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout:
        sys.stderr.write(f"not audited: {done.stderr[-300:]}\n")
        return
    found = json.loads(done.stdout)["dependencies"]
    asked = [each for each in found if "skip_reason" not in each]
    sys.stderr.write(f"audited: {len(asked)} of {len(found)} packages\n")
    known = {each["name"]: each["vulns"] for each in asked if each["vulns"]}
    assert not {name for name, each in known.items() if any(v["fix_versions"] for v in each)}


def await_health(process: subprocess.Popen[bytes], image: Image, port: str, log: Path) -> None:
    """Wait until the image's own health check succeeds."""
    name, *rest = image.commands["HEALTHCHECK"]
    python = str(image.root / "opt" / "venv" / "bin" / name)
    check = [python, *(part.replace("8000", port) for part in rest)]
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        done = subprocess.run(check, capture_output=True, check=False, **unprivileged())
        if done.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(log.read_text())
