"""The configuration: frozen, checked where it is built, and every error says what to write instead."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from polymux.cluster.config import ClusterConfig, ModelConfig, SecurityConfig
from polymux.cluster.environment import FIELDS, VARIABLES
from polymux.cluster.quantities import format_bytes, parse_bytes, parse_seconds
from polymux.cluster.validation import Section
from polymux.disagg.slack import Slack
from polymux.transport.errors import ConfigError


def refused(data: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.from_dict(data)
    return caught.value


def sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


# ---------------------------------------------------------------- defaults and round trips


def test_an_empty_configuration_is_valid() -> None:
    config = ClusterConfig.from_dict({})
    assert (config.pools.prefill.workers, config.pools.decode.workers, config.models) == (1, 1, ())
    assert isinstance(config.policies.turn_policy(), Slack)


def test_a_configuration_survives_plain_data_json_and_pickle() -> None:
    config = ClusterConfig.from_dict(
        {
            "models": [{"name": "a", "path": "/models/a", "slo": "batch", "pin": True}],
            "pools": {"decode": {"workers": 2, "arena_bytes": "64MiB", "num_threads": 1}},
            "security": {"api_keys": ["secret-key-1"]},
            "liveness": {"orphan_timeout_s": None},
        }
    )
    assert ClusterConfig.from_dict(json.loads(json.dumps(config.to_dict(show_secrets=True)))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_configuration_cannot_be_changed() -> None:
    config = ClusterConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.engine.max_num_seqs = 1


def test_every_setting_is_described() -> None:
    undescribed = [
        f"{s.__name__}.{name}" for s in sections(ClusterConfig) for name, field in s.model_fields.items() if not field.description
    ]
    assert not undescribed


def test_every_default_is_itself_valid() -> None:
    for section in sections(ClusterConfig):
        if section is not ModelConfig:
            assert isinstance(section(), BaseModel)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("data", "param", "words"),
    [
        ({"engin": {}}, "engin", "did you mean engine?"),
        ({"engine": {"max_seqs": 4}}, "engine.max_seqs", "did you mean engine.max_num_seqs?"),
        ({"max_num_seqs": 4}, "max_num_seqs", "did you mean engine.max_num_seqs?"),
        ({"pools": {"decode": {"arena": "1GiB"}}}, "pools.decode.arena", "did you mean pools.decode.arena_bytes?"),
        ({"models": [{"name": "a", "path": "b", "dtyp": "auto"}]}, "models[0].dtyp", "did you mean models[0].dtype?"),
        ({"store": {"xyzzy": 1}}, "store.xyzzy", "known here: budget_bytes, kv_bytes"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_key_that_was_probably_meant(data: dict[str, Any], param: str, words: str) -> None:
    error = refused(data)
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("data", "param", "words"),
    [
        ({"engine": {"max_num_seqs": 0}}, "engine.max_num_seqs", ["=0", "greater than or equal to 1", "default 64"]),
        ({"engine": {"block_size": 32}}, "engine.block_size", ["=32", "should be 16"]),
        ({"pools": {"prefill": {"arena_bytes": "64 apples"}}}, "pools.prefill.arena_bytes", ["'64 apples'", "512MiB", "default auto"]),
        ({"limits": {"request_timeout_s": "soon"}}, "limits.request_timeout_s", ["'soon'", "10m"]),
        ({"limits": {"request_timeout_s": 0}}, "limits.request_timeout_s", ["greater than 0"]),
        ({"models": [{"name": "a b", "path": "x"}]}, "models[0].name", ["'a b'", "letters, digits"]),
        ({"models": [{"name": "a"}]}, "models[0].path", ["is missing", "Hugging Face checkpoint"]),
        ({"models": {"name": "a"}}, "models", ["tuple"]),
        ({"policies": {"decode": "best"}}, "policies.decode", ["'best'", "there are: request_level"]),
        ({"policies": {"prefill": "sjf"}}, "policies.prefill", ["'sjf'", "grouped_fcfs"]),
        ({"serve": {"port": 70000}}, "serve.port", ["=70000", "65535"]),
        ({"engine": {"kv_fraction": float("nan")}}, "engine.kv_fraction", ["finite"]),
    ],
)
def test_a_wrong_value_is_an_error_with_field_value_and_remedy(data: dict[str, Any], param: str, words: list[str]) -> None:
    error = refused(data)
    assert error.param == param
    for word in words:
        assert word in error.message


def test_settings_that_contradict_each_other_are_refused() -> None:
    error = refused({"liveness": {"report_interval_s": 10, "worker_lease_s": 15}})
    assert "worker_lease_s=15.0 is below two report intervals" in error.message
    error = refused({"models": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]})
    assert "models has a twice" in error.message


def test_several_errors_are_told_at_once_and_not_without_end() -> None:
    error = refused({"engine": {f"bad{i}": 1 for i in range(9)}})
    assert "engine.bad0" in error.message
    assert "engine.bad4" in error.message
    assert "and 4 more" in error.message


@pytest.mark.parametrize("data", [[], "text", None, 3])
def test_what_is_not_a_mapping_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        ClusterConfig.from_dict(data)


# ---------------------------------------------------------------- secrets


def test_api_keys_are_kept_as_hashes_and_told_apart() -> None:
    security = SecurityConfig(api_keys=("secret-key-1", "secret-key-2"))
    assert "secret-key" not in repr(security) + str(security.model_dump())
    assert security.accepts("secret-key-2")
    assert not security.accepts("secret-key-3")
    assert not security.accepts(None)
    assert not security.accepts(security.api_keys[0])  # the hash is not a key


def test_a_key_may_be_given_as_its_hash() -> None:
    hashed = "sha256:" + hashlib.sha256(b"secret-key-1").hexdigest()
    assert SecurityConfig(api_keys=(hashed,)).accepts("secret-key-1")


def test_without_keys_everyone_may_come_in() -> None:
    assert SecurityConfig().accepts(None)


def test_no_error_shows_a_secret() -> None:
    assert "hunter2" not in refused({"security": {"api_keys": ["hunter2"]}}).message
    assert "tokentoken" not in refused({"security": {"cluster_token": "tokentoken"}}).message


def test_a_dump_without_secrets_cannot_become_an_open_server() -> None:
    config = ClusterConfig.from_dict({"security": {"api_keys": ["secret-key-1"], "cluster_token": "t" * 32}})
    shown = config.to_dict()
    assert "t" * 32 not in json.dumps(shown)
    assert refused(shown).param == "security.api_keys[0]" or "security" in str(refused(shown).param)


def test_every_cluster_gets_a_token_of_its_own() -> None:
    assert ClusterConfig().security.cluster_token != ClusterConfig().security.cluster_token


# ---------------------------------------------------------------- files, environment, flags


def write(folder: Path, data: object) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_flags_outrank_the_environment_which_outranks_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"log_level": "DEBUG", "engine": {"max_num_seqs": 2, "batch_invariant": False}})
    environ = {"POLYMUX_LOG_LEVEL": "WARNING", "POLYMUX_API_KEY": "first-key, second-key", "UNRELATED": "x"}
    config = ClusterConfig.load(path, overrides=["engine.batch_invariant=true", "pools.decode.arena_bytes=32MiB"], environ=environ)
    assert (config.log_level, config.engine.max_num_seqs, config.engine.batch_invariant) == ("WARNING", 2, True)
    assert config.pools.decode.arena_bytes == 32 << 20
    assert config.security.accepts("second-key")
    assert ClusterConfig.load(path, overrides=["log_level=ERROR"], environ=environ).log_level == "ERROR"


def test_a_model_path_is_looked_for_beside_the_file_first(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    path = write(tmp_path, {"models": [{"name": "a", "path": "mine"}, {"name": "b", "path": "org/on-the-hub"}]})
    mine, hub = ClusterConfig.load(path, environ={}).models
    assert mine.path == str(tmp_path / "mine")
    assert hub.path == "org/on-the-hub"


def test_no_file_means_the_defaults() -> None:
    assert ClusterConfig.load(environ={}).pools == ClusterConfig().pools


@pytest.mark.parametrize(("text", "words"), [("a: [", "is not YAML"), ("- 1", "must hold a mapping"), ("engine: 3", "engine")])
def test_a_file_that_is_not_a_configuration_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        ClusterConfig.load(path, environ={})
    assert "broken.yaml" in caught.value.message


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.yaml"):
        ClusterConfig.load(tmp_path / "nowhere.yaml", environ={})


def test_a_section_whose_lines_are_all_commented_out_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "sparse.yaml"
    path.write_text("engine:\n  # max_num_seqs: 4\npools:\n  decode:\nliveness:\n  orphan_timeout_s: null\n")
    config = ClusterConfig.load(path, overrides=["engine.max_num_seqs=3"], environ={})
    assert (config.engine.max_num_seqs, config.pools) == (3, ClusterConfig().pools)
    assert config.liveness.orphan_timeout_s is None
    assert ClusterConfig.load(path, environ={}).engine == ClusterConfig().engine


@pytest.mark.parametrize("override", ["engine", "log_level.deep=1", "serve.port=["])
def test_an_override_that_names_no_setting_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        ClusterConfig.load(overrides=["log_level=INFO", override], environ={})


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert ClusterConfig.load(tmp_path / "empty.yaml", environ={}).engine == ClusterConfig().engine


def test_every_variable_that_stands_for_a_field_is_documented_and_every_field_exists() -> None:
    assert FIELDS.keys() <= VARIABLES.keys()
    for path in FIELDS.values():
        value: Any = ClusterConfig()
        for part in path.split("."):
            value = getattr(value, part)


# ---------------------------------------------------------------- SLOs, sizes, durations


def test_a_class_gives_the_slos_that_the_model_leaves_out() -> None:
    assert ModelConfig(name="a", path="p").slos == (10.0, 0.1)
    assert ModelConfig(name="a", path="p", slo="batch", tpot_slo_s="50ms").slos == (600.0, 0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("64mb", 64_000_000), ("4096", 4096), (7, 7), (".5KiB", 512)]
)
def test_sizes_are_read_as_people_write_them(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("10m", 600.0), ("1.5", 1.5), (2, 2.0), ("1h", 3600.0), ("20us", 20e-6)])
def test_durations_are_read_as_people_write_them(text: str | int, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "MiB", "-1", "1 2MiB", "1e3", "inf", True, -5, None, float("nan"), "1XiB", [1]])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_bytes(value)


@settings(deadline=None)
@given(st.integers(0, 2**50))
def test_a_size_survives_being_written(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes
