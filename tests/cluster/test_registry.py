"""The registry: what is registered can be asked for, and a name means one set of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polymux.cluster.registry import Registry
from polymux.transport.errors import ConfigError, ModelNotFound
from polymux.transport.messages import KVLayout, ModelSpec
from polymux.transport.units import ModelName

SPEC = ModelSpec(
    model=ModelName("llama-small"),
    path="/models/llama-small",
    digest="d1",
    config_json="{}",
    dtype="bfloat16",
    kv=KVLayout(num_layers=2, num_kv_heads=2, head_dim=32, dtype="bfloat16"),
    weight_bytes=1 << 20,
    vocab_size=4096,
    max_model_len=512,
    eos_token_ids=(0,),
)


def named(model: str, digest: str = "d1") -> ModelSpec:
    return replace(SPEC, model=ModelName(model), digest=digest)


def test_models_are_listed_in_the_order_in_which_they_came() -> None:
    registry = Registry(max_models=8)
    for name in "cab":
        registry.register(named(name))
    assert [spec.model for spec in registry.specs()] == ["c", "a", "b"]
    assert "a" in registry
    assert len(registry) == 3


def test_the_same_model_again_changes_nothing() -> None:
    registry = Registry(max_models=8)
    assert registry.register(SPEC)
    assert not registry.register(SPEC)
    assert registry.catalogue == 1


def test_the_same_weights_may_get_other_slos_and_the_catalogue_says_so() -> None:
    registry = Registry(max_models=8)
    registry.register(SPEC)
    assert not registry.register(replace(SPEC, tpot_slo_s=1.0))
    assert registry.get("llama-small").tpot_slo_s == 1.0
    assert registry.catalogue == 2


@pytest.mark.parametrize("change", [{"digest": "d2"}, {"dtype": "float32"}, {"kv": replace(SPEC.kv, dtype="float32")}])
def test_a_name_is_not_given_to_other_weights(change: dict[str, object]) -> None:
    registry = Registry(max_models=8)
    registry.register(SPEC)
    with pytest.raises(ConfigError, match=r"llama-small.*another name"):
        registry.register(replace(SPEC, **change))  # type: ignore[arg-type]
    assert registry.get("llama-small") == SPEC


def test_the_same_weights_may_have_two_names() -> None:
    registry = Registry(max_models=8)
    assert registry.register(named("a"))
    assert registry.register(named("b"))


@pytest.mark.parametrize("name", ["", " a", "a b", "-a", "a" * 129, "a\n", "ä"])
def test_a_name_that_a_url_or_a_label_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        Registry(max_models=8).register(named(name))


@pytest.mark.parametrize("name", ["a", "Qwen/Qwen2.5-0.5B", "org/model:latest", "m@v1+x", "a" * 128])
def test_hub_ids_and_tags_are_names(name: str) -> None:
    assert Registry(max_models=8).register(named(name))


@pytest.mark.parametrize("field", ["weight_bytes", "max_model_len", "tpot_slo_s"])
def test_a_spec_that_cannot_be_served_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=0"):
        Registry(max_models=8).register(replace(SPEC, **{field: 0}))  # type: ignore[arg-type]


def test_a_full_registry_refuses_new_models_and_keeps_the_old() -> None:
    registry = Registry(max_models=1)
    registry.register(SPEC)
    with pytest.raises(ConfigError, match="max_models=1"):
        registry.register(named("other"))
    assert not registry.register(SPEC)


def test_an_unknown_model_is_not_found_and_the_near_name_is_named() -> None:
    registry = Registry(max_models=8)
    registry.register(SPEC)
    with pytest.raises(ModelNotFound, match="did you mean 'llama-small'") as caught:
        registry.get("lama-small")
    assert (caught.value.status, caught.value.param) == (404, "model")
    with pytest.raises(ModelNotFound, match="/v1/models"):
        registry.get("zzz")
