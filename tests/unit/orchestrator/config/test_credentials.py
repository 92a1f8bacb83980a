"""Credentials come from the environment or a file. A config with one is refused, without printing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.loader import load_config
from orchestrator.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("run.mirror", "s3://AKIA:sesame@bucket/prefix", "AWS_SECRET_ACCESS_KEY"),
        ("run.mirror", "s3://bucket/prefix?secret_key=sesame", "AWS_SECRET_ACCESS_KEY"),
        ("telemetry.mlflow_uri", "https://me:sesame@mlflow.example", "MLFLOW_TRACKING_PASSWORD"),
        ("reward.url", "https://h/score?api_key=sesame", r"reward\.token_from"),
        ("evaluate.judge.url", "https://h/v1?api_key=sesame", r"evaluate\.judge\.token_from"),
        ("model.path", "https://me:sesame@hub/x", "the environment"),
        ("prompts.path", "s3://me:sesame@bucket/x", "the environment"),
        ("reward.rules", "[{function: 'https://me:sesame@h'}]", "the environment"),
        ("none.such", "http://me:sesame@h", "the environment"),
    ],
)
def test_a_credential_in_a_url_is_refused_with_the_way_out(tmp_path: Path, key: str, value: str, way_out: str) -> None:
    file = tmp_path / "config.yaml"
    section, _, name = key.rpartition(".")
    nested = f"{{{name}: {value if value.startswith('[') else repr(value)}}}"
    for part in reversed(section.split(".")):
        nested = f"{{{part}: {nested}}}"
    file.write_text(nested)
    for path, overrides in ((file, []), (None, [f"{key}={value}"])):
        with pytest.raises(ConfigError, match=rf"{key}\S* holds a credential.*{way_out}") as raised:
            load_config(path, overrides)
        assert "sesame" not in str(raised.value)


def test_ordinary_addresses_are_taken() -> None:
    config = load_config(
        None, ["stages=[sample,preferences]", "run.mirror=s3://bucket/prefix?region=eu&endpoint_override=host:9000"]
    )
    assert config.run.mirror is not None
