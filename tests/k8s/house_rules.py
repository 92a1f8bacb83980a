"""Requirements of a run that Kubernetes and KubeRay do not enforce.

A rule takes all objects of one rendered overlay and yields complaints. RULES is the whole list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from tests.k8s.kuberay_rules import cluster_of, groups_of, templates_of

Manifest = dict[str, Any]
Rule = Callable[[list[Manifest]], Iterator[str]]

MAX_PORT_NAME = 15
ROLES_WITH_MODELS = ("trainer", "rollout")
_SUFFIXES = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    suffix: 1024.0**power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1)
}


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number: `500m` is 0.5, `1Gi` is 2**30."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * _SUFFIXES[match[2]]


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in objects if manifest["kind"] == kind]


def rayjob_of(objects: list[Manifest]) -> Manifest:
    (job,) = of_kind(objects, "RayJob")
    return job


def ray_container(template: Manifest) -> Manifest:
    container: Manifest = template["spec"]["containers"][0]
    return container


def ray_pods(objects: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates by group name, with the labels that the operator adds."""
    pods = {}
    for name, template in templates_of(rayjob_of(objects)).items():
        group, node_type = ("headgroup", "head") if name == "head" else (name, "worker")
        added = {"ray.io/is-ray-node": "yes", "ray.io/node-type": node_type, "ray.io/group": group}
        pods[name] = {**template, "metadata": {"labels": {**template["metadata"]["labels"], **added}}}
    return pods


def selects(selector: Manifest, pod: Manifest) -> bool:
    wanted, labels = selector.get("matchLabels", {}), pod["metadata"]["labels"]
    return all(labels.get(key) == value for key, value in wanted.items())


def memory_is_guaranteed(objects: list[Manifest]) -> Iterator[str]:
    """Ray uses the limit as its size; with a smaller request the node can overcommit and the kernel kill an actor."""
    job = rayjob_of(objects)
    for name, template in {**templates_of(job), "submitter": job["spec"]["submitterPodTemplate"]}.items():
        resources = ray_container(template).get("resources", {})
        request, limit = (resources.get(key, {}).get("memory") for key in ("requests", "limits"))
        if request is None or limit is None or quantity(request) != quantity(limit):
            yield f"{name}: memory request {request} and limit {limit} must be set and equal"


def cpus_are_whole(objects: list[Manifest]) -> Iterator[str]:
    """Ray derives its number of CPUs from the limit, rounded up."""
    for name, template in templates_of(rayjob_of(objects)).items():
        cpus = ray_container(template).get("resources", {}).get("limits", {}).get("cpu")
        if cpus is None or quantity(cpus) != int(quantity(cpus)):
            yield f"{name}: cpu limit {cpus} must be a whole number"


def shared_memory_is_mounted(objects: list[Manifest]) -> Iterator[str]:
    """Container runtimes give 64 MB of /dev/shm; its content counts as the container's memory."""
    for name, template in templates_of(rayjob_of(objects)).items():
        container = ray_container(template)
        names = {mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"}
        volumes = [volume for volume in template["spec"].get("volumes", []) if volume["name"] in names]
        if len(volumes) != 1 or volumes[0].get("emptyDir", {}).get("medium") != "Memory":
            yield f"{name}: /dev/shm must be an emptyDir of medium Memory"
            continue
        size = volumes[0]["emptyDir"].get("sizeLimit")
        limit = container.get("resources", {}).get("limits", {}).get("memory", "0")
        if size is None or quantity(size) > quantity(limit) / 2:
            yield f"{name}: /dev/shm needs a sizeLimit of at most half the memory limit {limit}, got {size}"
        if name in ROLES_WITH_MODELS and size is not None and quantity(size) < quantity("1Gi"):
            yield f"{name}: /dev/shm of {size} is too small for models"


def volumes_lead_somewhere(objects: list[Manifest]) -> Iterator[str]:
    claims = {claim["metadata"]["name"] for claim in of_kind(objects, "PersistentVolumeClaim")}
    maps = {config["metadata"]["name"]: config["data"] for config in of_kind(objects, "ConfigMap")}
    for name, template in templates_of(rayjob_of(objects)).items():
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        beside = cluster_of(rayjob_of(objects)).get("autoscalerOptions", {}) if name == "head" else {}
        mounts = [*ray_container(template).get("volumeMounts", []), *beside.get("volumeMounts", [])]
        mounted = {mount["name"] for mount in mounts}
        if mounted != set(volumes):
            yield f"{name}: mounted {sorted(mounted)}, declared {sorted(volumes)}"
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield f"{name}: no PersistentVolumeClaim {claim}"
            if config := volume.get("configMap"):
                missing = {item["key"] for item in config["items"]} - set(maps.get(config["name"], {}))
                if missing:
                    yield f"{name}: ConfigMap {config['name']} has no {sorted(missing)}"


def coordinator_has_one_place(objects: list[Manifest]) -> Iterator[str]:
    job = rayjob_of(objects)
    wanted = json.loads(job["spec"].get("entrypointResources", "{}"))
    if not wanted:
        yield "entrypointResources is empty: the driver would run on the head"
    if cluster_of(job)["headGroupSpec"].get("resources", {}).keys() & wanted.keys():
        yield "the head offers the entrypoint's resources"
    offering = [group for group in groups_of(job) if wanted.keys() <= group.get("resources", {}).keys()]
    if len(offering) != 1 or offering[0].get("maxReplicas") != 1:
        yield f"the entrypoint's resources {sorted(wanted)} must be offered by one group of one pod"


def head_does_no_work(objects: list[Manifest]) -> Iterator[str]:
    head = cluster_of(rayjob_of(objects))["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "head: num-cpus must be 0"
    if any(key.endswith("/gpu") for key in ray_container(head["template"])["resources"]["limits"]):
        yield "head: holds a GPU and runs no work"


def pods_without_gpus_see_none(objects: list[Manifest]) -> Iterator[str]:
    """NVIDIA's runtime exposes all GPUs of a node to a pod that requests none, unless it sets `void`."""
    templates = templates_of(rayjob_of(objects))
    limits = {name: ray_container(template)["resources"]["limits"] for name, template in templates.items()}
    on_gpus = {name for name, limit in limits.items() if "nvidia.com/gpu" in limit}
    for name, template in templates.items():
        environment = {variable["name"]: variable.get("value") for variable in ray_container(template).get("env", [])}
        hidden = environment.get("NVIDIA_VISIBLE_DEVICES") == "void"
        if on_gpus and hidden == (name in on_gpus):
            yield f"{name}: NVIDIA_VISIBLE_DEVICES must be void where no GPU is asked for, and only there"
        if name in on_gpus and not template["spec"].get("tolerations"):
            yield f"{name}: needs a toleration of the GPU nodes' taint"


def authentication_is_on(objects: list[Manifest]) -> Iterator[str]:
    """An open Jobs API is remote code execution (CVE-2023-48022)."""
    if cluster_of(rayjob_of(objects)).get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode must be token"


def pods_are_unprivileged(objects: list[Manifest]) -> Iterator[str]:
    job = rayjob_of(objects)
    for name, template in {**templates_of(job), "submitter": job["spec"]["submitterPodTemplate"]}.items():
        pod, container = template["spec"].get("securityContext", {}), ray_container(template).get("securityContext", {})
        if not pod.get("runAsNonRoot") or not pod.get("fsGroup"):
            yield f"{name}: must run as non-root, with an fsGroup that can write the run folder"
        if container.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation must be false"


def stopping_leaves_time(objects: list[Manifest]) -> Iterator[str]:
    """Trainers, head and coordinator must outlive the job's grace period; else the last checkpoint has no ranks."""
    job = rayjob_of(objects)
    environment = yaml.safe_load(job["spec"].get("runtimeEnvYAML", "{}")).get("env_vars", {})
    grace_s = float(environment.get("RAY_JOB_STOP_WAIT_TIME_S", 3))
    if grace_s < 60:
        yield f"RAY_JOB_STOP_WAIT_TIME_S of {grace_s:.0f} s is too short for a checkpoint"
    for name, template in templates_of(job).items():
        variables = {item["name"]: item.get("value") for item in ray_container(template).get("env", [])}
        drain_s = float(variables.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
        if name != "rollout" and drain_s < grace_s:
            yield f"{name}: drains for {drain_s:.0f} s, less than the job's {grace_s:.0f} s"
        if template["spec"].get("terminationGracePeriodSeconds", 30) <= drain_s:
            yield f"{name}: terminationGracePeriodSeconds must exceed the drain of {drain_s:.0f} s"


def attempts_resume(objects: list[Manifest]) -> Iterator[str]:
    """Each retry is a new cluster: it can continue only with a fixed run id and a run folder on a claim."""
    spec = rayjob_of(objects)["spec"]
    if spec.get("backoffLimit", 0) < 1:
        yield "backoffLimit must allow a further attempt"
    words = dict(word.split("=", 1) for word in spec["entrypoint"].split() if "=" in word)
    root = words.get("run.root")
    if "run.id" not in words or root is None:
        yield "entrypoint must set run.id and run.root"
    for name, template in templates_of(rayjob_of(objects)).items():
        volumes = {volume["name"] for volume in template["spec"]["volumes"] if "persistentVolumeClaim" in volume}
        paths = {mount["mountPath"] for mount in ray_container(template)["volumeMounts"] if mount["name"] in volumes}
        if name != "head" and root not in paths:
            yield f"{name}: run.root={root} is not on a claim"


def ports_are_declared(objects: list[Manifest]) -> Iterator[str]:
    pods = ray_pods(objects)
    ports = {name: {port["name"] for port in ray_container(pod).get("ports", [])} for name, pod in pods.items()}
    for name, declared in ports.items():
        for port in declared:
            if len(port) > MAX_PORT_NAME:
                yield f"{name}: port name {port} is longer than {MAX_PORT_NAME} characters"
    for monitor in of_kind(objects, "PodMonitor"):
        matched = [name for name, pod in pods.items() if selects(monitor["spec"]["selector"], pod)]
        if not matched:
            yield f"PodMonitor {monitor['metadata']['name']} selects no pod"
        offered = set().union(*(ports[name] for name in matched))
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in offered:
                yield f"PodMonitor {monitor['metadata']['name']}: no selected pod declares port {endpoint['port']}"


def coordinator_serves_its_metrics(objects: list[Manifest]) -> Iterator[str]:
    job = rayjob_of(objects)
    words = dict(word.split("=", 1) for word in job["spec"]["entrypoint"].split() if "=" in word)
    ports = ray_container(templates_of(job)["coordinator"]).get("ports", [])
    numbers = {port["name"]: str(port["containerPort"]) for port in ports}
    if words.get("telemetry.prometheus_port") != numbers.get("rlhf-metrics", ""):
        yield "telemetry.prometheus_port is not the coordinator's port rlhf-metrics"
    if words.get("telemetry.prometheus_host") != "0.0.0.0":
        yield "telemetry.prometheus_host must be 0.0.0.0: another address can't be scraped from outside the pod"


def pods_are_guarded(objects: list[Manifest]) -> Iterator[str]:
    for kind, path in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        guards = of_kind(objects, kind)
        for name, pod in ray_pods(objects).items():
            if not any(selects(guard["spec"][path], pod) for guard in guards):
                yield f"{name}: no {kind} selects it"
    for budget in of_kind(objects, "PodDisruptionBudget"):
        spec = budget["spec"]
        if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
            yield "PodDisruptionBudget: a RayCluster has no scale subresource: only an integer minAvailable works"
        largest = 1 + sum(group["maxReplicas"] for group in groups_of(rayjob_of(objects)))
        if isinstance(spec.get("minAvailable"), int) and spec["minAvailable"] < largest:
            yield f"PodDisruptionBudget: minAvailable must cover all {largest} pods"


def network_admits_who_must_come(objects: list[Manifest]) -> Iterator[str]:
    job = rayjob_of(objects)
    submitter, worker = job["spec"]["submitterPodTemplate"], ray_pods(objects)["trainer"]
    policies = [policy["spec"] for policy in of_kind(objects, "NetworkPolicy")]
    rules = [rule for spec in policies if selects(spec["podSelector"], worker) for rule in spec.get("ingress", [])]
    open_to = {"submitter": False, "worker": False}
    opened = set()
    for rule in rules:
        ports = {port["port"] for port in rule.get("ports", [])}
        local = [peer["podSelector"] for peer in rule["from"] if "namespaceSelector" not in peer]
        open_to["submitter"] |= 8265 in ports and any(selects(selector, submitter) for selector in local)
        open_to["worker"] |= not ports and any(selects(selector, worker) for selector in local)
        opened |= ports
    for name, admitted in open_to.items():
        if not admitted:
            yield f"NetworkPolicy keeps out the {name}"
    for name, template in templates_of(job).items():
        for port in ray_container(template).get("ports", []):
            if "metrics" in port["name"] and port["containerPort"] not in opened:
                yield f"NetworkPolicy closes {name}'s port {port['name']}"


RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        memory_is_guaranteed,
        cpus_are_whole,
        shared_memory_is_mounted,
        volumes_lead_somewhere,
        coordinator_has_one_place,
        head_does_no_work,
        pods_without_gpus_see_none,
        authentication_is_on,
        pods_are_unprivileged,
        stopping_leaves_time,
        attempts_resume,
        ports_are_declared,
        coordinator_serves_its_metrics,
        pods_are_guarded,
        network_admits_who_must_come,
    )
}


def complaints(objects: list[Manifest]) -> list[str]:
    return [complaint for rule in RULES.values() for complaint in rule(objects)]
