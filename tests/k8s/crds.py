"""Strict validation of custom resources against the openAPIV3Schema of their CustomResourceDefinition.

Does the schema checks of `kubectl apply --validate=strict` offline: types, enums, patterns, required fields, and
unknown fields as errors. CEL rules and the operator's own checks are in kuberay_rules.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Manifest = dict[str, Any]
Schemas = Mapping[tuple[str, str], jsonschema.Draft7Validator]

_METADATA: Manifest = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_FORMATS = jsonschema.FormatChecker(formats=())


@_FORMATS.checks("int32")
def _is_int32(value: object) -> bool:
    return not isinstance(value, int) or -(2**31) <= value < 2**31


def load_schemas(folders: Iterable[Path]) -> Schemas:
    """Validators by (apiVersion, kind), one for each served version of each CRD in the folders' YAML files."""
    schemas = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.yaml"))):
        definition = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in definition["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = _METADATA
            key = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
            schemas[key] = jsonschema.Draft7Validator(schema, format_checker=_FORMATS)
    return schemas


def violations(manifest: Manifest, schemas: Schemas) -> list[str]:
    """Schema errors of a manifest, one line each, `path: message`. Raises KeyError for an unknown kind."""
    validator = schemas[manifest["apiVersion"], manifest["kind"]]
    errors = validator.iter_errors(_without_nulls(manifest))
    return sorted(f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors)


def _strict(node: Any) -> Any:
    """Converts a structural schema to JSON schema in which an object with known properties allows no others."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    strict = {key: _strict(value) for key, value in node.items() if key != "properties"}
    properties = {name: _strict(schema) for name, schema in node.get("properties", {}).items()}
    if properties:
        strict["properties"] = properties
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    if node.get("x-kubernetes-int-or-string"):
        strict.pop("anyOf", None)
        strict["type"] = ["integer", "string"]
    if node.get("nullable") and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    # The server inserts defaults before it validates.
    strict["required"] = [name for name in node.get("required", []) if "default" not in properties.get(name, {})]
    return strict


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
