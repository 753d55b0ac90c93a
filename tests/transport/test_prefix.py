"""Names of prefixes: equal where everything is equal, different where anything is not."""

from dataclasses import replace

import pytest

from polymux.transport.messages import KVLayout, ModelSpec
from polymux.transport.prefix import MAX_PROMPT_MARKS, chain, extend, mark, marks_of, root, salt_of
from polymux.transport.units import ModelName, pack_ids, unpack_ids

KV = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, dtype="float32")
SPEC = ModelSpec(
    model=ModelName("m"),
    path="",
    digest="d1",
    config_json="{}",
    dtype="float32",
    kv=KV,
    weight_bytes=1,
    vocab_size=100,
    max_model_len=512,
    eos_token_ids=(),
)
PROMPT = pack_ids(range(40))


def marks(spec: ModelSpec, salt: str, *prompts: bytes) -> list[int]:
    return unpack_ids(marks_of(spec, salt, prompts))


def test_only_full_blocks_have_a_name() -> None:
    assert len(marks(SPEC, "", PROMPT)) == 2
    assert marks(SPEC, "", pack_ids(range(16))) == []  # its one block is not matchable: a token must be left to compute


def test_a_mark_names_the_whole_prefix() -> None:
    same_second_block = pack_ids([99, *range(1, 40)])
    assert not set(marks(SPEC, "", PROMPT)) & set(marks(SPEC, "", same_second_block))


def test_a_name_is_the_same_under_every_name_of_one_model() -> None:
    assert marks(replace(SPEC, model=ModelName("other")), "", PROMPT) == marks(SPEC, "", PROMPT)


@pytest.mark.parametrize("spec", [replace(SPEC, digest="d2"), replace(SPEC, kv=replace(KV, dtype="bfloat16"))])
def test_other_weights_and_other_layouts_have_other_names(spec: ModelSpec) -> None:
    assert not set(marks(spec, "", PROMPT)) & set(marks(SPEC, "", PROMPT))


def test_tenants_and_salts_are_apart() -> None:
    salts = {salt_of(tenant, salt) for tenant in ("", "a", "b") for salt in ("", "a", "b")}
    assert len(salts) == 9 and salt_of("", "") == ""
    assert len({tuple(marks(SPEC, salt, PROMPT)) for salt in salts}) == 9


def test_several_prompts_have_the_marks_of_what_they_share() -> None:
    other = pack_ids([*range(16), *range(50, 80)])
    assert marks(SPEC, "", PROMPT, PROMPT, other) == marks(SPEC, "", PROMPT)[:1]
    assert marks(SPEC, "", PROMPT, pack_ids(range(20))) == marks(SPEC, "", PROMPT)[:1]


def test_a_very_long_prompt_has_a_bounded_number_of_marks() -> None:
    assert len(marks(SPEC, "", bytes(4 * 16 * (MAX_PROMPT_MARKS + 5)))) == MAX_PROMPT_MARKS


def test_marks_are_the_beginnings_of_the_chain() -> None:
    first = extend(root(SPEC, "s"), PROMPT[:64])
    assert chain(SPEC, "s", PROMPT) == [first, extend(first, PROMPT[64:128])]
    assert marks(SPEC, "s", PROMPT) == [mark(digest) for digest in chain(SPEC, "s", PROMPT)]
