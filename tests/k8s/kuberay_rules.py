"""What KubeRay 1.7 rejects although its schema allows it: the operator's validation and the CRD's CEL rules.

A rule takes a RayJob manifest that conforms to the schema and yields complaints. RULES is the complete list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

Manifest = dict[str, Any]
Rule = Callable[[Manifest], Iterator[str]]

MAX_RAYJOB_NAME = 47
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
TOKEN_AUTH_SINCE = (2, 52, 0)
# Fields whose feature gate is off by default.
ALPHA_FIELDS = ("networkPolicy", "tlsOptions", "historyServerOptions")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def cluster_of(job: Manifest) -> Manifest:
    cluster: Manifest = job["spec"]["rayClusterSpec"]
    return cluster


def groups_of(job: Manifest) -> list[Manifest]:
    groups: list[Manifest] = cluster_of(job).get("workerGroupSpecs", [])
    return groups


def templates_of(job: Manifest) -> dict[str, Manifest]:
    """Pod templates of all Ray nodes by group name; the head's group is `head`."""
    workers = {group["groupName"]: group["template"] for group in groups_of(job)}
    return {"head": cluster_of(job)["headGroupSpec"]["template"], **workers}


def name_is_a_short_label(job: Manifest) -> Iterator[str]:
    name = job["metadata"]["name"]
    if len(name) > MAX_RAYJOB_NAME:
        yield f"name {name!r} has {len(name)} characters; a RayJob may have {MAX_RAYJOB_NAME}"
    if not _DNS_1035.fullmatch(name):
        yield f"name {name!r} is no DNS-1035 label"


def submission_mode_is_known(job: Manifest) -> Iterator[str]:
    mode = job["spec"].get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode!r} is none of {', '.join(SUBMISSION_MODES)}"


def replicas_are_ordered(job: Manifest) -> Iterator[str]:
    for group in groups_of(job):
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if low is None or high is None:
            yield f"group {group['groupName']}: minReplicas and maxReplicas must both be set"
        elif not 0 <= low <= group.get("replicas", low) <= high:
            yield f"group {group['groupName']}: not minReplicas <= replicas <= maxReplicas"


def group_names_are_distinct(job: Manifest) -> Iterator[str]:
    names = [group["groupName"] for group in groups_of(job)]
    if len(set(names)) != len(names):
        yield f"groupName is repeated in {names}"


def deletion_is_said_once(job: Manifest) -> Iterator[str]:
    spec = job["spec"]
    rules = spec.get("deletionStrategy", {}).get("deletionRules")
    if rules is not None and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if rules is not None and spec.get("ttlSecondsAfterFinished"):
        yield "ttlSecondsAfterFinished has no meaning beside deletionRules: give each rule its ttlSeconds"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes: true"


def deletion_rules_are_sound(job: Manifest) -> Iterator[str]:
    strategy = job["spec"].get("deletionStrategy")
    if strategy is None:
        return
    legacy = "onSuccess" in strategy, "onFailure" in strategy
    rules = strategy.get("deletionRules")
    if rules is not None and any(legacy):
        yield "deletionRules and onSuccess/onFailure exclude each other"
    if rules is None and not all(legacy):
        yield "deletionStrategy needs deletionRules, or onSuccess and onFailure"
    seen = set()
    for rule in rules or []:
        condition = rule["condition"]
        states = [condition[key] for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if len(states) != 1:
            yield "a deletion condition has either jobStatus or jobDeploymentStatus"
        if rule["policy"] == "DeleteWorkers" and cluster_of(job).get("enableInTreeAutoscaling"):
            yield "DeleteWorkers does not go with enableInTreeAutoscaling"
        key = rule["policy"], *states
        if key in seen:
            yield f"deletion rule {key} is repeated"
        seen.add(key)


def limits_are_positive(job: Manifest) -> Iterator[str]:
    spec = job["spec"]
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} must be positive"
    for limit in (spec.get("backoffLimit", 0), spec.get("submitterConfig", {}).get("backoffLimit", 0)):
        if limit < 0:
            yield "backoffLimit must not be negative"


def json_and_yaml_texts_parse(job: Manifest) -> Iterator[str]:
    spec = job["spec"]
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML is not YAML: {error}"
    else:
        variables = environment.get("env_vars", {}) if isinstance(environment, dict) else None
        if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
            yield "runtimeEnvYAML must be a mapping whose env_vars are strings"
    try:
        resources = json.loads(spec.get("entrypointResources", "{}"))
    except json.JSONDecodeError as error:
        yield f"entrypointResources is not JSON: {error}"
    else:
        if not isinstance(resources, dict) or not all(isinstance(value, int | float) for value in resources.values()):
            yield "entrypointResources must be a JSON object of numbers"


def entrypoint_is_one_command(job: Manifest) -> Iterator[str]:
    """The operator inserts the entrypoint into a shell line; a newline or `;` would end it early."""
    entrypoint = job["spec"].get("entrypoint", "")
    if not entrypoint.strip() or set(entrypoint.strip()) & set("\n;&|$`"):
        yield f"entrypoint {entrypoint!r} is not one plain command"


def start_parameters_are_strings(job: Manifest) -> Iterator[str]:
    head = cluster_of(job)["headGroupSpec"]
    for name, group in [("head", head), *((group["groupName"], group) for group in groups_of(job))]:
        parameters, resources = group.get("rayStartParams", {}), group.get("resources", {})
        for key, value in {**parameters, **resources}.items():
            if not isinstance(value, str):
                yield f"group {name}: {key} must be a string, got {value!r}"
        if resources and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
            yield f"group {name}: say resources either in `resources` or in rayStartParams"


def autoscaling_fits(job: Manifest) -> Iterator[str]:
    cluster = cluster_of(job)
    version = cluster.get("autoscalerOptions", {}).get("version")
    if not cluster.get("enableInTreeAutoscaling"):
        if "autoscalerOptions" in cluster:
            yield "autoscalerOptions without enableInTreeAutoscaling are ignored"
        version = None
    for name, template in templates_of(job).items():
        if version == "v2" and template["spec"].get("restartPolicy", "Never") != "Never":
            yield f"group {name}: autoscaler v2 needs restartPolicy Never"
    for group in groups_of(job):
        if version != "v2" and {"idleTimeoutSeconds", "priority"} & set(group):
            yield f"group {group['groupName']}: idleTimeoutSeconds and priority need autoscaler v2"
        if group.get("suspend") and cluster.get("enableInTreeAutoscaling"):
            yield f"group {group['groupName']}: cannot be suspended under the autoscaler"


def authentication_fits(job: Manifest) -> Iterator[str]:
    cluster = cluster_of(job)
    options = cluster.get("authOptions", {})
    if options.get("mode") == "token":
        numbers = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", cluster.get("rayVersion", ""))
        if numbers is None or tuple(map(int, numbers.groups())) < TOKEN_AUTH_SINCE:
            yield "token authentication needs rayVersion, at least 2.52.0"
    if options.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not supported under a RayJob"


def no_field_is_behind_a_closed_gate(job: Manifest) -> Iterator[str]:
    for field in ALPHA_FIELDS:
        if field in cluster_of(job):
            yield f"rayClusterSpec.{field} needs a feature gate that is off by default"
    if "upgradeStrategy" in cluster_of(job):
        yield "rayClusterSpec.upgradeStrategy is not allowed under a RayJob"


def storage_of_the_head_is_said_once(job: Manifest) -> Iterator[str]:
    head = cluster_of(job)["headGroupSpec"]
    names = {variable["name"] for variable in head["template"]["spec"]["containers"][0].get("env", [])}
    for name in sorted(names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}):
        yield f"head: {name} belongs into gcsFaultToleranceOptions"
    if head.get("rayStartParams", {}).keys() & {"redis-password", "redis-username"}:
        yield "head: redis credentials belong into gcsFaultToleranceOptions"


RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        name_is_a_short_label,
        submission_mode_is_known,
        replicas_are_ordered,
        group_names_are_distinct,
        deletion_is_said_once,
        deletion_rules_are_sound,
        limits_are_positive,
        json_and_yaml_texts_parse,
        entrypoint_is_one_command,
        start_parameters_are_strings,
        autoscaling_fits,
        authentication_fits,
        no_field_is_behind_a_closed_gate,
        storage_of_the_head_is_said_once,
    )
}


def complaints(job: Manifest) -> list[str]:
    return [complaint for rule in RULES.values() for complaint in rule(job)]
