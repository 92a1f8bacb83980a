"""The API server, KubeRay, Ray and a run accept both overlays, as `kubectl apply -k` sends them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from jobs.commands import COMMANDS
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.errors import ConfigError
from tests.deadlines import scaled
from tests.k8s import hardening_rules, house_rules, kuberay_rules
from tests.k8s.conftest import ROOT, Render
from tests.k8s.crds import Manifest, Schemas, violations
from tests.k8s.house_rules import of_kind, ray_container, rayjob_of
from tests.k8s.kuberay_rules import cluster_of, templates_of

KUBERNETES = "1.37.0"
CONFIGS = {"cpu": "quickstart.yaml", "gpu": "gpu.yaml"}


def core_objects(objects: list[Manifest]) -> list[Manifest]:
    custom = {"RayJob", "PodMonitor"}
    return [manifest for manifest in objects if manifest["kind"] not in custom]


def pods(objects: list[Manifest]) -> dict[str, Manifest]:
    job = rayjob_of(objects)
    templates = {**templates_of(job), "submitter": job["spec"]["submitterPodTemplate"]}
    return {
        name: {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": name, **template["metadata"]}}
        for name, template in templates.items()
    }


def converted(objects: list[Manifest]) -> dict[str, Any]:
    """The node types that Ray's autoscaler would see in the RayCluster."""
    job = rayjob_of(objects)
    cluster = {"metadata": {"name": job["metadata"]["name"], "namespace": "rlhf"}, "spec": cluster_of(job)}
    node_types: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return node_types


def run_config(objects: list[Manifest], folder: Path) -> Config:
    """The config that the entrypoint loads in the coordinator's pod."""
    job = rayjob_of(objects)
    template = templates_of(job)["coordinator"]
    (volume,) = [volume for volume in template["spec"]["volumes"] if "configMap" in volume]
    (item,) = volume["configMap"]["items"]
    maps = {found["metadata"]["name"]: found["data"] for found in of_kind(objects, "ConfigMap")}
    (mount,) = [mount for mount in ray_container(template)["volumeMounts"] if mount["name"] == volume["name"]]
    words = job["spec"]["entrypoint"].split()
    assert words[:5] == ["python", "-m", "jobs", "run", "--config"]
    assert find_spec(words[2]) is not None and words[3] in COMMANDS
    assert words[5] == f"{mount['mountPath']}/{item['path']}"
    file = folder / item["path"]
    file.write_text(maps[volume["configMap"]["name"]][item["key"]], encoding="utf-8")
    return load_config(file, words[6:])


def test_custom_resources_pass_the_strict_schema(objects: list[Manifest], schemas: Schemas) -> None:
    custom = [manifest for manifest in objects if (manifest["apiVersion"], manifest["kind"]) in schemas]
    assert {"RayJob"} <= {manifest["kind"] for manifest in custom} <= {"RayJob", "PodMonitor"}
    assert [violations(manifest, schemas) for manifest in custom] == [[]] * len(custom)


def test_core_objects_pass_strict_validation(objects: list[Manifest]) -> None:
    kinds = {"Namespace", "ConfigMap", "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy"}
    assert {manifest["kind"] for manifest in core_objects(objects)} == kinds
    for manifest in core_objects(objects):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_pod_templates_pass_strict_validation_as_pods(objects: list[Manifest]) -> None:
    assert set(pods(objects)) == {"head", "coordinator", "trainer", "rollout", "submitter"}
    for pod in pods(objects).values():
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_kuberay_accepts_the_job(objects: list[Manifest]) -> None:
    assert kuberay_rules.complaints(rayjob_of(objects)) == []


def test_the_house_rules_hold(objects: list[Manifest]) -> None:
    assert house_rules.complaints(objects) == []
    assert hardening_rules.complaints(objects) == []


def test_everything_lives_in_one_namespace(objects: list[Manifest]) -> None:
    namespaced = [manifest for manifest in objects if manifest["kind"] != "Namespace"]
    assert {manifest["metadata"]["namespace"] for manifest in namespaced} == {"rlhf"}


def test_ray_version_is_the_locked_one(objects: list[Manifest]) -> None:
    lock = (ROOT / "requirements/cpu.txt").read_text(encoding="utf-8")
    (locked,) = re.findall(r"(?m)^ray==(\S+)", lock)
    assert cluster_of(rayjob_of(objects))["rayVersion"] == locked


def test_the_autoscaler_sees_the_groups(objects: list[Manifest], overlay: str) -> None:
    types = converted(objects)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert [name for name, node in types.items() if "coordinator" in node["resources"]] == ["coordinator"]
    assert types["coordinator"]["resources"]["CPU"] == 0
    scaling = [name for name, node in types.items() if node["min_workers"] < node["max_workers"]]
    assert scaling == (["rollout"] if overlay == "gpu" else [])
    has_gpus = {name for name, node in types.items() if node["resources"].get("GPU")}
    assert has_gpus == ({"trainer", "rollout"} if overlay == "gpu" else set())
    assert {name: node["labels"].get("rlhf.role") for name, node in types.items() if name != "headgroup"} == {
        "coordinator": "coordinator",
        "trainer": "trainer",
        "rollout": "rollout",
    }


def test_mounted_config_is_the_laptops_file_byte_for_byte(objects: list[Manifest], overlay: str) -> None:
    (config_map,) = of_kind(objects, "ConfigMap")
    for name, text in config_map["data"].items():
        assert text.encode() == (ROOT / "jobs/configs" / name).read_bytes()
    volumes = templates_of(rayjob_of(objects))["coordinator"]["spec"]["volumes"]
    (volume,) = [volume for volume in volumes if "configMap" in volume]
    assert volume["configMap"]["items"] == [{"key": CONFIGS[overlay], "path": "run.yaml"}]


def test_entrypoint_loads_the_mounted_config(objects: list[Manifest], tmp_path: Path) -> None:
    config = run_config(objects, tmp_path)
    assert config.run.id == "rlhf-ppo"
    assert config.run.root == Path("/runs")
    assert config.run.cache.is_relative_to(config.run.root)
    assert config.telemetry.prometheus_port == 9464


def test_entrypoint_with_an_unknown_key_is_refused(objects: list[Manifest], tmp_path: Path) -> None:
    rayjob_of(objects)["spec"]["entrypoint"] += " run.rot=/runs"
    with pytest.raises(ConfigError, match=r"run\.root"):
        run_config(objects, tmp_path)


@pytest.mark.parametrize(
    ("image", "rendered"),
    [
        ({"newTag": "2"}, "registry.example/rlhf:2"),
        ({"digest": f"sha256:{'ab' * 32}"}, f"registry.example/rlhf@sha256:{'ab' * 32}"),
    ],
    ids=["tag", "digest"],
)
def test_one_setting_changes_the_image_of_every_pod(
    render: Render, overlay: str, tmp_path: Path, image: dict[str, str], rendered: str
) -> None:
    for folder in ("k8s", "jobs/configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    file = tmp_path / "k8s/overlays" / overlay / "kustomization.yaml"
    kustomization = yaml.safe_load(file.read_text(encoding="utf-8"))
    kustomization["images"] = [{"name": "rlhf-orchestrator", "newName": "registry.example/rlhf", **image}]
    kustomization["namePrefix"] = "a-"
    file.write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    objects = render(file.parent)
    assert {container["image"] for pod in pods(objects).values() for container in pod["spec"]["containers"]} == {
        rendered
    }
    assert list(house_rules.volumes_lead_somewhere(objects)) == []


def test_a_changed_config_gets_a_new_name(render: Render, tmp_path: Path) -> None:
    for folder in ("k8s", "jobs/configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (before,) = of_kind(render(tmp_path / "k8s/overlays/cpu"), "ConfigMap")
    with (tmp_path / "jobs/configs/quickstart.yaml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    objects = render(tmp_path / "k8s/overlays/cpu")
    (after,) = of_kind(objects, "ConfigMap")
    assert after["metadata"]["name"] != before["metadata"]["name"]
    assert list(house_rules.volumes_lead_somewhere(objects)) == []


def test_monitoring_can_be_applied_alone(render: Render, schemas: Schemas) -> None:
    monitors = of_kind(render(ROOT / "k8s/monitoring"), "PodMonitor")
    assert {monitor["metadata"]["name"] for monitor in monitors} == {"rlhf-head", "rlhf-workers"}
    for monitor in monitors:
        assert violations(monitor, schemas) == []
        assert monitor["metadata"]["namespace"] == "rlhf"
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert "ray_io_cluster" in [rule["targetLabel"] for rule in endpoint["relabelings"]]


def test_monitors_select_the_pods_of_the_cpu_overlay(render: Render, objects: list[Manifest]) -> None:
    monitors = of_kind(render(ROOT / "k8s/monitoring"), "PodMonitor")
    others = [manifest for manifest in objects if manifest["kind"] != "PodMonitor"]
    assert list(house_rules.ports_are_declared([*others, *monitors])) == []


def test_entrypoint_resources_are_what_only_the_coordinator_offers(objects: list[Manifest]) -> None:
    job = rayjob_of(objects)
    offered = converted(objects)["coordinator"]["resources"]
    assert all(offered[name] >= amount for name, amount in json.loads(job["spec"]["entrypointResources"]).items())


def test_submitters_shell_hands_ray_what_the_manifest_says(objects: list[Manifest]) -> None:
    """KubeRay builds a `ray job submit` line, with JSON in double quotes, for bash."""
    spec = rayjob_of(objects)["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    quoted = [json.dumps(text) for text in (json.dumps(environment), spec["entrypointResources"])]
    line = f"show --runtime-env-json {quoted[0]} --entrypoint-resources {quoted[1]} -- {spec['entrypoint']} ;"
    script = f"show() {{ printf '%s\\n' \"$@\"; }}; {line}"
    shown = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True, timeout=scaled(10))
    words = shown.stdout.splitlines()
    assert json.loads(words[1]) == environment
    assert json.loads(words[3]) == json.loads(spec["entrypointResources"])
    assert words[5:] == spec["entrypoint"].split()
