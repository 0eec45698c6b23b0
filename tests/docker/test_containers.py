"""Dockerfile.cpu built by buildah and run by podman, as root on a machine without Docker.

The base image is a stand-in of the same Debian, made by debootstrap; everything else is the file's own. Packages come
from where this machine's apt and pip take them. The container runs as compose.yaml says: read-only, without capabilities,
as user 10001; crun and the default limits do not work on every machine, so runc and smaller ones are taken.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deltamux.serve.launch import free_port
from tests.docker.test_walk import KEY, ask_router

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BASE_IMAGE = "docker.io/library/python:3.11-slim-bookworm"
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
APT = Path("/etc/apt")
TOOLS = ("buildah", "podman", "runc", "debootstrap")
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
PATIENCE = 300


class Containers:
    """buildah and podman over a store of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options = ["--storage-driver=vfs", f"--root={folder}/store", f"--runroot={folder}/run"]

    def __call__(self, tool: str, *words: str | Path) -> str:
        done = subprocess.run(
            [tool, *self.options, *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{tool} {words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()


def mirror() -> str:
    """Where this machine's apt takes Debian from."""
    asked = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME)",
        "Created-By: Packages",
    ]
    listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listed.splitlines())
    return next(address for address, suite in pairs if suite == SUITE)


def make_base_image(containers: Containers) -> None:
    """A Debian with Python 3.11 under the base image's name."""
    system = containers.folder / "debian"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE]
    subprocess.run([*command, system, mirror()], check=True, capture_output=True)
    (system / "etc/apt/sources.list").unlink()
    for name in ("sources.list.d", "apt.conf.d", "keyrings"):
        if (APT / name).is_dir():
            shutil.copytree(APT / name, system / "etc/apt" / name, dirs_exist_ok=True)
    if (APT / "sources.list").is_file():
        shutil.copy(APT / "sources.list", system / "etc/apt")
    shutil.copy(CERTIFICATES, system / CERTIFICATES.relative_to("/"))
    made = containers("buildah", "from", "scratch")
    containers("buildah", "copy", "--quiet", made, system, "/")
    containers("buildah", "commit", "--quiet", made, BASE_IMAGE)
    containers("buildah", "rm", made)
    shutil.rmtree(system)


def pip_settings(target: Path) -> list[str]:
    """This machine's settings of pip as one file, and the mounts that a build needs to follow them."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = [line.split("=", 1) for line in listed.splitlines() if line.startswith("global.")]
    settings = {name.removeprefix("global."): value.strip("'") for name, value in pairs}
    lines = [f"{name} = {value.replace(' ', chr(10) + '    ')}" for name, value in settings.items()]
    target.write_text("\n".join(["[global]", *lines, ""]))
    words = " ".join(settings.values()).split()
    paths = {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    # An index in a folder may name files beside it.
    paths |= {
        Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:")
    }
    mounts = [f"--volume={target}:/etc/pip.conf:ro"]
    return mounts + [f"--volume={path}:{path}:ro" for path in sorted(paths)]


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    assert not missing, f"apt-get install {' '.join(TOOLS)}: there is no {missing[0]}"
    assert os.getuid() == 0, "containers are made by root here"
    folder = tmp_path_factory.mktemp("containers")
    found = Containers(folder)
    try:
        make_base_image(found)
        found(
            *("buildah", "build", "--format=docker", "--isolation=chroot", "--network=host"),
            *("--pull=never", "--target=server", f"--file={ROOT}/docker/Dockerfile.cpu"),
            *pip_settings(folder / "pip.conf"),
            *("--tag=deltamux:cpu", ROOT),
        )
        yield found
    finally:
        # Gigabytes, with files of other users.
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def site(tmp_path: Path, checkpoints: SimpleNamespace, text_file: Path) -> Path:
    """What is mounted: a base, experts, a router and their configuration."""
    folder = tmp_path / "site"
    folder.mkdir()
    checkpoints.write_parts(folder, text_file, ("math", "sql", "shell"))
    names = [{"name": name, "path": name} for name in ("math", "sql", "shell")]
    checkpoints.write_config(folder, {}, experts=names)
    # safetensors makes files that only their owner reads; README.md says what to do.
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    return folder


def await_health(containers: Containers, name: str, url: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        state = json.loads(containers("podman", "inspect", name))[0]["State"]
        assert state["Running"], containers("podman", "logs", name)
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(f"no health within {PATIENCE} s: {containers('podman', 'logs', name)}")


def test_the_cpu_image_answers_and_ends_as_it_is_asked(containers: Containers, site: Path) -> None:
    image: dict[str, Any] = json.loads(containers("podman", "image", "inspect", "deltamux:cpu"))[0]
    assert image["Config"]["User"] == "10001:10001"
    assert "Healthcheck" in image or image["HealthCheck"]["Test"][0] == "CMD"
    port, name = str(free_port()), "deltamux-test"
    containers(
        *("podman", "run", "--detach", f"--name={name}", "--runtime=runc", "--network=host"),
        *LIMITS,
        *("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"),
        *("--tmpfs=/tmp:exec", "--shm-size=2g", f"--volume={site}:/srv/deltamux:ro"),
        *(f"--env=DELTAMUX_API_KEY={KEY}", "--env=OMP_NUM_THREADS=1", "--env=HF_HUB_OFFLINE=1"),
        *("deltamux:cpu", "/srv/deltamux/deltamux.yaml", "--host=127.0.0.1", f"--port={port}"),
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await_health(containers, name, url)
        assert ask_router(url).json()["model"] == "sql"
        assert httpx.get(f"{url}/v1/models", timeout=PATIENCE).status_code == 401
        whose = containers("podman", "exec", name, "python", "-c", "import os; print(os.getuid())")
        assert whose == "10001"
        containers("podman", "stop", "--time=120", name)
        state = json.loads(containers("podman", "inspect", name))[0]["State"]
        assert state["ExitCode"] == 0, containers("podman", "logs", name)
    finally:
        containers("podman", "rm", "--force", "--time=0", name)
