"""Each check of this folder fails on a manifest that violates it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.k8s import hardening_rules, house_rules, kuberay_rules
from tests.k8s.crds import Manifest, Schemas, violations
from tests.k8s.house_rules import of_kind, quantity, rayjob_of
from tests.k8s.kuberay_rules import cluster_of

Break = Callable[[list[Manifest]], Any]


def spec(objects: list[Manifest]) -> Manifest:
    found: Manifest = rayjob_of(objects)["spec"]
    return found


def cluster(objects: list[Manifest]) -> Manifest:
    return cluster_of(rayjob_of(objects))


def head(objects: list[Manifest]) -> Manifest:
    found: Manifest = cluster(objects)["headGroupSpec"]
    return found


def group(objects: list[Manifest], name: str) -> Manifest:
    (found,) = [group for group in cluster(objects)["workerGroupSpecs"] if group["groupName"] == name]
    return found


def pod(objects: list[Manifest], name: str) -> Manifest:
    found: Manifest = (head(objects) if name == "head" else group(objects, name))["template"]["spec"]
    return found


def container(objects: list[Manifest], name: str) -> Manifest:
    found: Manifest = pod(objects, name)["containers"][0]
    return found


def only(objects: list[Manifest], kind: str) -> Manifest:
    return of_kind(objects, kind)[0]


def drop(items: list[Manifest], **equal: Any) -> None:
    left = [item for item in items if not equal.items() <= item.items()]
    assert len(left) < len(items)
    items[:] = left


def reword(objects: list[Manifest], old: str, new: str) -> None:
    assert old in spec(objects)["entrypoint"]
    spec(objects)["entrypoint"] = spec(objects)["entrypoint"].replace(old, new)


SCHEMA_BREAKS: dict[str, Break] = {
    "misspelt field": lambda o: spec(o).update(shutdownAfterJobFinish=True),
    "misspelt field in a group": lambda o: group(o, "rollout").update(maxReplica=3),
    "misspelt field in a container": lambda o: container(o, "trainer").update(resource={}),
    "misspelt volume": lambda o: pod(o, "trainer")["volumes"][0]["emptyDir"].update(sizelimit="1Gi"),
    "num-cpus as a number": lambda o: head(o)["rayStartParams"].update({"num-cpus": 0}),
    "resource as a number": lambda o: group(o, "coordinator")["resources"].update(coordinator=1),
    "replicas as text": lambda o: group(o, "trainer").update(replicas="2"),
    "replicas beyond int32": lambda o: group(o, "trainer").update(replicas=2**31),
    "unknown auth mode": lambda o: cluster(o)["authOptions"].update(mode="tokens"),
    "unknown autoscaler": lambda o: cluster(o)["autoscalerOptions"].update(version="v3"),
    "unknown deletion policy": lambda o: spec(o)["deletionStrategy"]["deletionRules"][0].update(policy="Delete"),
    "bad quantity": lambda o: container(o, "trainer")["resources"]["limits"].update(memory="12 GB"),
    "group without a name": lambda o: group(o, "rollout").pop("groupName"),
    "label as a number": lambda o: rayjob_of(o)["metadata"]["labels"].update(run=1),
    "misspelt metadata": lambda o: rayjob_of(o)["metadata"].update(label={}),
}


@pytest.mark.parametrize("name", SCHEMA_BREAKS)
def test_schema_refuses(name: str, gpu_objects: list[Manifest], schemas: Schemas) -> None:
    job = rayjob_of(gpu_objects)
    SCHEMA_BREAKS[name](gpu_objects)
    assert violations(job, schemas) != []


def test_schema_refuses_a_misspelt_pod_monitor(gpu_objects: list[Manifest], schemas: Schemas) -> None:
    monitor = only(gpu_objects, "PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["relabeling"] = []
    assert violations(monitor, schemas) != []


KUBERAY_BREAKS: dict[str, list[Break]] = {
    "name_is_a_short_label": [
        lambda o: rayjob_of(o)["metadata"].update(name="r" * 48),
        lambda o: rayjob_of(o)["metadata"].update(name="Rlhf"),
        lambda o: rayjob_of(o)["metadata"].update(name="1-run"),
    ],
    "submission_mode_is_known": [lambda o: spec(o).update(submissionMode="K8SJobMode")],
    "replicas_are_ordered": [
        lambda o: group(o, "rollout").update(minReplicas=17),
        lambda o: group(o, "rollout").update(replicas=17),
        lambda o: group(o, "trainer").pop("maxReplicas"),
        lambda o: group(o, "trainer").update(minReplicas=-1),
    ],
    "group_names_are_distinct": [lambda o: group(o, "rollout").update(groupName="trainer")],
    "deletion_is_said_once": [
        lambda o: spec(o).update(shutdownAfterJobFinishes=True),
        lambda o: spec(o).update(ttlSecondsAfterFinished=60),
        lambda o: spec(o).update(suspend=True),
    ],
    "deletion_rules_are_sound": [
        lambda o: spec(o)["deletionStrategy"].update(onSuccess={"policy": "DeleteSelf"}),
        lambda o: spec(o).update(deletionStrategy={"onFailure": {"policy": "DeleteSelf"}}),
        lambda o: spec(o)["deletionStrategy"]["deletionRules"][0]["condition"].update(jobDeploymentStatus="Failed"),
        lambda o: spec(o)["deletionStrategy"]["deletionRules"][0]["condition"].pop("jobStatus"),
        lambda o: spec(o)["deletionStrategy"]["deletionRules"][0].update(policy="DeleteWorkers"),
        lambda o: spec(o)["deletionStrategy"]["deletionRules"].append(spec(o)["deletionStrategy"]["deletionRules"][0]),
    ],
    "limits_are_positive": [
        lambda o: spec(o).update(activeDeadlineSeconds=0),
        lambda o: spec(o).update(backoffLimit=-1),
        lambda o: spec(o)["submitterConfig"].update(backoffLimit=-1),
    ],
    "json_and_yaml_texts_parse": [
        lambda o: spec(o).update(runtimeEnvYAML="env_vars: {a: 'b"),
        lambda o: spec(o).update(runtimeEnvYAML="env_vars: {RAY_JOB_STOP_WAIT_TIME_S: 600}"),
        lambda o: spec(o).update(runtimeEnvYAML="just text"),
        lambda o: spec(o).update(entrypointResources="{coordinator: 1}"),
        lambda o: spec(o).update(entrypointResources='{"coordinator": "1"}'),
    ],
    "entrypoint_is_one_command": [
        lambda o: spec(o).update(entrypoint="python -m jobs run\n--config /etc/rlhf/run.yaml"),
        lambda o: spec(o).update(entrypoint="cd /app; python -m jobs run"),
        lambda o: spec(o).update(entrypoint=" "),
    ],
    "start_parameters_are_strings": [
        lambda o: head(o)["rayStartParams"].update({"num-cpus": 0}),
        lambda o: group(o, "coordinator")["resources"].update(coordinator=1),
        lambda o: group(o, "coordinator")["rayStartParams"].update({"num-cpus": "0"}),
    ],
    "autoscaling_fits": [
        lambda o: pod(o, "trainer").update(restartPolicy="Always"),
        lambda o: cluster(o)["autoscalerOptions"].update(version="v1"),
        lambda o: cluster(o).pop("enableInTreeAutoscaling"),
        lambda o: group(o, "trainer").update(suspend=True),
    ],
    "authentication_fits": [
        lambda o: cluster(o).pop("rayVersion"),
        lambda o: cluster(o).update(rayVersion="2.51.9"),
        lambda o: cluster(o)["authOptions"].update(enableK8sTokenAuth=True),
    ],
    "no_field_is_behind_a_closed_gate": [
        lambda o: cluster(o).update(tlsOptions={"enabled": True}),
        lambda o: cluster(o).update(upgradeStrategy={"type": "Recreate"}),
    ],
    "storage_of_the_head_is_said_once": [
        lambda o: container(o, "head")["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
        lambda o: head(o)["rayStartParams"].update({"redis-password": "x"}),
    ],
}

HOUSE_BREAKS: dict[str, list[Break]] = {
    "memory_is_guaranteed": [
        lambda o: container(o, "trainer")["resources"]["requests"].update(memory="1Gi"),
        lambda o: container(o, "head")["resources"]["limits"].pop("memory"),
        lambda o: spec(o)["submitterPodTemplate"]["spec"]["containers"][0].pop("resources"),
    ],
    "cpus_are_whole": [lambda o: container(o, "trainer")["resources"]["limits"].update(cpu="1500m")],
    "shared_memory_is_mounted": [
        lambda o: drop(container(o, "rollout")["volumeMounts"], mountPath="/dev/shm"),
        lambda o: pod(o, "trainer")["volumes"][0]["emptyDir"].pop("medium"),
        lambda o: pod(o, "trainer")["volumes"][0]["emptyDir"].pop("sizeLimit"),
        lambda o: pod(o, "trainer")["volumes"][0]["emptyDir"].update(sizeLimit="64Mi"),
        lambda o: pod(o, "trainer")["volumes"][0]["emptyDir"].update(sizeLimit="400Gi"),
    ],
    "volumes_lead_somewhere": [
        lambda o: pod(o, "trainer")["volumes"].pop(),
        lambda o: container(o, "trainer")["volumeMounts"].pop(),
        lambda o: drop(o, kind="PersistentVolumeClaim"),
        lambda o: only(o, "ConfigMap")["data"].pop("gpu.yaml"),
        lambda o: only(o, "ConfigMap")["metadata"].update(name="rlhf-config"),
    ],
    "coordinator_has_one_place": [
        lambda o: spec(o).pop("entrypointResources"),
        lambda o: head(o).update(resources={"coordinator": "1"}),
        lambda o: group(o, "coordinator").pop("resources"),
        lambda o: group(o, "trainer").update(resources={"coordinator": "1"}),
        lambda o: group(o, "coordinator").update(maxReplicas=2),
    ],
    "head_does_no_work": [
        lambda o: head(o)["rayStartParams"].pop("num-cpus"),
        lambda o: container(o, "head")["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
    ],
    "pods_without_gpus_see_none": [
        lambda o: drop(container(o, "head")["env"], name="NVIDIA_VISIBLE_DEVICES"),
        lambda o: drop(container(o, "coordinator")["env"], name="NVIDIA_VISIBLE_DEVICES"),
        lambda o: container(o, "trainer")["env"].append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}),
        lambda o: pod(o, "rollout").pop("tolerations"),
    ],
    "authentication_is_on": [
        lambda o: cluster(o).pop("authOptions"),
        lambda o: cluster(o)["authOptions"].update(mode="disabled"),
    ],
    "pods_are_unprivileged": [
        lambda o: pod(o, "head").pop("securityContext"),
        lambda o: container(o, "rollout").pop("securityContext"),
    ],
    "stopping_leaves_time": [
        lambda o: spec(o).pop("runtimeEnvYAML"),
        lambda o: pod(o, "coordinator").update(terminationGracePeriodSeconds=600),
        lambda o: pod(o, "rollout").pop("terminationGracePeriodSeconds"),
        lambda o: drop(container(o, "trainer")["env"], name="RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"),
    ],
    "attempts_resume": [
        lambda o: spec(o).update(backoffLimit=0),
        lambda o: reword(o, "run.id=rlhf-ppo", ""),
        lambda o: reword(o, "run.root=/runs", "run.root=/tmp/runs"),
    ],
    "ports_are_declared": [
        lambda o: drop(container(o, "coordinator")["ports"], name="rlhf-metrics"),
        lambda o: drop(container(o, "head")["ports"], name="as-metrics"),
        lambda o: container(o, "head")["ports"][0].update(name="gcs-server-metrics"),
        lambda o: only(o, "PodMonitor")["spec"]["podMetricsEndpoints"][0].update(port="metric"),
        lambda o: only(o, "PodMonitor")["spec"]["selector"]["matchLabels"].update({"ray.io/node-type": "heads"}),
    ],
    "coordinator_serves_its_metrics": [
        lambda o: reword(o, "prometheus_port=9464", "prometheus_port=9465"),
        lambda o: reword(o, "prometheus_host=0.0.0.0", "prometheus_host=127.0.0.1"),
    ],
    "pods_are_guarded": [
        lambda o: drop(o, kind="NetworkPolicy"),
        lambda o: only(o, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(run="other"),
        lambda o: only(o, "PodDisruptionBudget")["spec"].update(maxUnavailable=0),
        lambda o: only(o, "PodDisruptionBudget")["spec"].update(minAvailable="100%"),
        lambda o: only(o, "PodDisruptionBudget")["spec"].update(minAvailable=3),
    ],
    "network_admits_who_must_come": [
        lambda o: opened(o, "rlhf-ray")["ingress"].pop(0),
        lambda o: spec(o)["submitterPodTemplate"]["metadata"]["labels"].pop("app.kubernetes.io/component"),
        lambda o: drop(opened(o, "rlhf-ray")["ingress"][2]["ports"], port=9464),
    ],
}


def opened(objects: list[Manifest], name: str) -> Manifest:
    (found,) = [policy for policy in of_kind(objects, "NetworkPolicy") if policy["metadata"]["name"] == name]
    return found["spec"]


def autoscaler(objects: list[Manifest]) -> Manifest:
    found: Manifest = cluster(objects)["autoscalerOptions"]
    return found


def submitter(objects: list[Manifest]) -> Manifest:
    found: Manifest = spec(objects)["submitterPodTemplate"]["spec"]
    return found


TOKEN = {"name": "api-token", "mountPath": hardening_rules.TOKEN_PATH}
HARDENING_BREAKS: dict[str, list[Break]] = {
    "no_pod_holds_an_api_token": [
        lambda o: pod(o, "trainer").pop("automountServiceAccountToken"),
        lambda o: submitter(o).update(automountServiceAccountToken=True),
        lambda o: container(o, "head")["volumeMounts"].append(TOKEN),
        lambda o: drop(autoscaler(o)["volumeMounts"], name="api-token"),
    ],
    "root_file_systems_are_read_only": [
        lambda o: container(o, "rollout").update(securityContext={"allowPrivilegeEscalation": False}),
        lambda o: submitter(o)["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
        lambda o: autoscaler(o).pop("securityContext"),
        lambda o: autoscaler(o)["securityContext"].update(capabilities={"drop": ["NET_RAW"]}),
        lambda o: drop(container(o, "trainer")["volumeMounts"], mountPath="/tmp"),
        lambda o: drop(autoscaler(o)["volumeMounts"], mountPath="/home/rlhf"),
        lambda o: drop(pod(o, "coordinator")["volumes"], name="home"),
    ],
    "emptied_folders_are_bounded": [
        lambda o: [volume["emptyDir"].pop("sizeLimit") for volume in pod(o, "head")["volumes"] if "emptyDir" in volume],
        lambda o: submitter(o)["volumes"][0].update(emptyDir={}),
    ],
    "egress_is_limited": [
        lambda o: drop(o, spec=opened(o, "rlhf-ray")),
        lambda o: opened(o, "rlhf-submitter").update(policyTypes=["Ingress"]),
        lambda o: opened(o, "rlhf-ray")["egress"].append({}),
        lambda o: opened(o, "rlhf-ray")["egress"].pop(0),
        lambda o: opened(o, "rlhf-ray")["egress"].pop(1),
        lambda o: opened(o, "rlhf-downloads")["egress"][0]["to"][0]["ipBlock"].pop("except"),
        lambda o: opened(o, "rlhf-downloads")["egress"][0]["to"][0]["ipBlock"].update(
            cidr="10.1.0.0/16", **{"except": []}
        ),
        lambda o: opened(o, "rlhf-downloads")["egress"][0]["ports"].append({"port": 22}),
        lambda o: opened(o, "rlhf-downloads")["egress"][0].pop("ports"),
        lambda o: opened(o, "rlhf-autoscaler")["egress"][0]["to"][0]["ipBlock"].pop("except"),
        lambda o: opened(o, "rlhf-submitter")["egress"].pop(1),
    ],
    "secrets_are_where_they_are_used": [
        lambda o: container(o, "head").update(envFrom=[{"secretRef": {"name": "rlhf-model-secrets"}}]),
        lambda o: container(o, "rollout")["envFrom"].append({"secretRef": {"name": "rlhf-driver-secrets"}}),
        lambda o: container(o, "trainer")["env"].append(
            {"name": "X", "valueFrom": {"secretKeyRef": {"name": "rlhf-driver-secrets", "key": "X"}}}
        ),
    ],
}


def cases(breaks: dict[str, list[Break]]) -> list[Any]:
    return [
        pytest.param(rule, broken, id=f"{rule}-{number}")
        for rule, variants in breaks.items()
        for number, broken in enumerate(variants)
    ]


@pytest.mark.parametrize(("rule", "broken"), cases(KUBERAY_BREAKS))
def test_kuberay_rule_refuses(rule: str, broken: Break, gpu_objects: list[Manifest]) -> None:
    job = rayjob_of(gpu_objects)
    assert list(kuberay_rules.RULES[rule](job)) == []
    broken(gpu_objects)
    assert list(kuberay_rules.RULES[rule](job)) != []


@pytest.mark.parametrize(("rule", "broken"), cases(HOUSE_BREAKS))
def test_house_rule_refuses(rule: str, broken: Break, gpu_objects: list[Manifest]) -> None:
    assert list(house_rules.RULES[rule](gpu_objects)) == []
    broken(gpu_objects)
    assert list(house_rules.RULES[rule](gpu_objects)) != []


@pytest.mark.parametrize(("rule", "broken"), cases(HARDENING_BREAKS))
def test_hardening_rule_refuses(rule: str, broken: Break, gpu_objects: list[Manifest]) -> None:
    assert list(hardening_rules.RULES[rule](gpu_objects)) == []
    broken(gpu_objects)
    assert list(hardening_rules.RULES[rule](gpu_objects)) != []


def test_every_rule_has_a_breaking_case() -> None:
    assert set(HARDENING_BREAKS) == set(hardening_rules.RULES)
    assert set(KUBERAY_BREAKS) == set(kuberay_rules.RULES)
    assert set(HOUSE_BREAKS) == set(house_rules.RULES)


@pytest.mark.parametrize("kind", ["PodDisruptionBudget", "NetworkPolicy", "PersistentVolumeClaim", "Namespace"])
def test_core_validation_refuses_a_misspelt_field(kind: str, gpu_objects: list[Manifest]) -> None:
    manifest = only(gpu_objects, kind)
    manifest.setdefault("spec", {})["minAvailabel"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.37.0", strict=True)


def test_rays_converter_refuses_badly_quoted_resources(gpu_objects: list[Manifest]) -> None:
    broken = copy.deepcopy(cluster(gpu_objects))
    broken["workerGroupSpecs"][1]["rayStartParams"]["resources"] = "{trainer: 1}"
    with pytest.raises(ValueError, match="Expecting"):
        _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "rlhf"}, "spec": broken})


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("4", 4.0), (4, 4.0), ("1Ki", 1024.0), ("1.5Gi", 1.5 * 2**30), ("2G", 2e9)]
)
def test_quantity_reads_the_suffix(text: str | int, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "12 GB", "Gi", "1X"])
def test_quantity_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        quantity(text)
