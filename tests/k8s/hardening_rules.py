"""Security rules of a run's pods, in the form of house_rules.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from typing import Any

from tests.k8s.house_rules import Rule, of_kind, ray_pods, rayjob_of, selects
from tests.k8s.kuberay_rules import cluster_of

Manifest = dict[str, Any]

TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
WRITABLE = {"/tmp", "/home/rlhf"}
HTTPS, LOOKUP, JOBS_API = 443, 53, 8265
METADATA = ip_network("169.254.169.254/32")  # where clouds serve the node's credentials
PRIVATE = [ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]


def all_pods(objects: list[Manifest]) -> dict[str, Manifest]:
    return {**ray_pods(objects), "submitter": rayjob_of(objects)["spec"]["submitterPodTemplate"]}


def containers(objects: list[Manifest]) -> Iterator[tuple[str, str, Manifest]]:
    """(pod, container name, container), including the autoscaler that the operator adds to the head."""
    for name, pod in all_pods(objects).items():
        for container in pod["spec"]["containers"]:
            yield name, container["name"], container
    if (autoscaler := autoscaler_of(objects)) is not None:
        yield "head", "autoscaler", autoscaler


def autoscaler_of(objects: list[Manifest]) -> Manifest | None:
    cluster = cluster_of(rayjob_of(objects))
    return cluster.get("autoscalerOptions", {}) if cluster.get("enableInTreeAutoscaling") else None


def no_pod_holds_an_api_token(objects: list[Manifest]) -> Iterator[str]:
    """Only the autoscaler needs the API server; code that a run loads must not reach it."""
    for name, pod in all_pods(objects).items():
        if pod["spec"].get("automountServiceAccountToken") is not False:
            yield f"{name}: automountServiceAccountToken must be false"
    for pod, name, container in containers(objects):
        volumes = {volume["name"]: volume for volume in all_pods(objects)[pod]["spec"].get("volumes", [])}
        mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", [])}
        for path, volume in mounts.items():
            holds = any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
            if holds and (name, path) != ("autoscaler", TOKEN_PATH):
                yield f"{pod}: container {name} mounts a token at {path}"
        if name == "autoscaler" and TOKEN_PATH not in mounts:
            yield f"{pod}: the autoscaler has no token at {TOKEN_PATH}"


def root_file_systems_are_read_only(objects: list[Manifest]) -> Iterator[str]:
    for pod, name, container in containers(objects):
        security = container.get("securityContext", {})
        if security.get("readOnlyRootFilesystem") is not True:
            yield f"{pod}: container {name} needs readOnlyRootFilesystem: true"
        if security.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{pod}: container {name} must drop all capabilities"
        empty = {volume["name"] for volume in all_pods(objects)[pod]["spec"].get("volumes", []) if "emptyDir" in volume}
        writable = {mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] in empty}
        if not writable >= WRITABLE:
            yield f"{pod}: container {name} needs an emptyDir at {sorted(WRITABLE - writable)}"


def emptied_folders_are_bounded(objects: list[Manifest]) -> Iterator[str]:
    """Without a size limit they can fill the node's disk, and the node then evicts pods."""
    for name, pod in all_pods(objects).items():
        for volume in pod["spec"].get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name}: emptyDir {volume['name']} needs a sizeLimit"


def egress_is_limited(objects: list[Manifest]) -> Iterator[str]:
    policies = of_kind(objects, "NetworkPolicy")
    for name, pod in all_pods(objects).items():
        chosen = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], pod)]
        if not any("Egress" in spec["policyTypes"] for spec in chosen):
            yield f"{name}: no NetworkPolicy limits what it may ask"
        rules = [rule for spec in chosen for rule in spec.get("egress", [])]
        if not any(_ports(rule) == {LOOKUP} for rule in rules):
            yield f"{name}: can't look up names"
        for rule in rules:
            yield from (f"{name}: {fault}" for fault in _faults(rule, is_head=name == "head"))
        peers = [peer["podSelector"] for rule in rules for peer in rule.get("to", []) if "podSelector" in peer]
        wanted = ray_pods(objects)["head"] if name == "submitter" else ray_pods(objects)["trainer"]
        if not any(selects(selector, wanted) for selector in peers):
            yield f"{name}: can't reach the pods that it works with"


def _ports(rule: Manifest) -> set[int]:
    return {port["port"] for port in rule.get("ports", [])}


def _faults(rule: Manifest, *, is_head: bool) -> Iterator[str]:
    if not rule.get("to"):
        yield "an egress rule without `to` admits everything"
    for peer in rule.get("to", []):
        block = peer.get("ipBlock")
        if block is None:
            continue
        excepted = [ip_network(text) for text in block.get("except", [])]
        closed = [METADATA] if is_head else [METADATA, *PRIVATE]  # the API server often has a private address
        for network in closed:
            shared = max(ip_network(block["cidr"]), network, key=lambda part: part.prefixlen)
            if network.overlaps(ip_network(block["cidr"])) and not any(e.supernet_of(shared) for e in excepted):
                yield f"may ask {shared}"
        if not _ports(rule) or (_ports(rule) != {HTTPS} and not is_head):
            yield f"may ask addresses outside on ports {sorted(_ports(rule)) or 'of any number'}, not on {HTTPS} alone"


def secrets_are_where_they_are_used(objects: list[Manifest]) -> Iterator[str]:
    """The driver uses trackers and mirror; pods that load models fetch them."""
    allowed = {
        "coordinator": {"rlhf-driver-secrets", "rlhf-model-secrets"},
        "trainer": {"rlhf-model-secrets"},
        "rollout": {"rlhf-model-secrets"},
    }
    for pod, name, container in containers(objects):
        sources = [source["secretRef"]["name"] for source in container.get("envFrom", []) if "secretRef" in source]
        keys = [variable.get("valueFrom", {}).get("secretKeyRef", {}) for variable in container.get("env", [])]
        found = {*sources, *(key["name"] for key in keys if key)}
        if found - allowed.get(pod, set()):
            yield f"{pod}: container {name} has no use for {sorted(found - allowed.get(pod, set()))}"


RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        no_pod_holds_an_api_token,
        root_file_systems_are_read_only,
        emptied_folders_are_bounded,
        egress_is_limited,
        secrets_are_where_they_are_used,
    )
}


def complaints(objects: list[Manifest]) -> list[str]:
    return [complaint for rule in RULES.values() for complaint in rule(objects)]
