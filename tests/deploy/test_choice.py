"""One sequence's tokens to text: in order, in whole characters, up to a stop string, with logprobs beside their text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zero_stack import EOS

from polymux.actors.tokenizer import Tokenizer
from polymux.deploy.http.choice import Choice
from polymux.deploy.http.generation import SequencePlan
from polymux.transport.messages import FinishReason, SamplingParams, SequenceUpdate, TokenLogprobs
from polymux.transport.units import SequenceId, pack_ids

ID = SequenceId("r/0")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.open(checkpoint)


def choice(tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> Choice:
    plan = SequencePlan(prompt_ids=pack_ids([1]), num_prompt_tokens=1, sampling=SamplingParams(max_tokens=100, min_tokens=min_tokens))
    return Choice(0, plan, tokenizer.detokenizer(), stop)


def update(index: int, data: Sequence[int], end: FinishReason | None = None, *, logprobs: bool = False) -> SequenceUpdate:
    found = tuple(TokenLogprobs(token_id=token, logprob=-float(index + i)) for i, token in enumerate(data)) if logprobs else ()
    return SequenceUpdate(sequence_id=ID, index=index, token_ids=tuple(data), logprobs=found, finish_reason=end)


def texts(one: Choice, updates: Sequence[SequenceUpdate]) -> list[str]:
    """What a client sees after each update."""
    seen = []
    for each in updates:
        one.accept(each, 0.0)
        delta = one.take()
        seen.append(delta.text if delta else "")
    return seen


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer)
    assert texts(one, [update(i, [byte]) for i, byte in enumerate("a€b".encode())]) == ["a", "", "", "€", "b"]


def test_a_character_that_is_never_whole_ends_as_a_replacement(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer)
    assert texts(one, [update(0, "a€".encode()[:3], FinishReason.LENGTH)]) == ["a\ufffd"]


def test_the_token_that_stops_is_not_shown(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer)
    assert texts(one, [update(0, [*b"ab", ord("c")], FinishReason.STOP)]) == ["ab"]
    assert one.finish_reason is FinishReason.STOP
    assert len(one.output_ids) == 3


def test_a_stop_string_is_found_across_tokens_and_not_shown(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer, ["END"])
    assert texts(one, [update(i, [byte]) for i, byte in enumerate(b"aE bENDc")]) == ["a", "", "E ", "b", "", "", "", ""]
    assert one.finish_reason is FinishReason.STOP
    assert one.stopped_by_text
    assert bytes(one.output_ids) == b"aE bEND"


def test_what_was_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer, ["END"])
    assert texts(one, [update(0, b"aEN"), update(3, b"x", FinishReason.LENGTH)]) == ["a", "ENx"]
    one = choice(tokenizer, ["END"])
    assert texts(one, [update(0, b"aEN", FinishReason.LENGTH)]) == ["aEN"]
    assert one.finish_reason is FinishReason.LENGTH


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer, ["b"], min_tokens=3)
    assert texts(one, [update(i, [byte]) for i, byte in enumerate(b"abcdbx")]) == ["a", "b", "c", "d", "", ""]
    assert bytes(one.output_ids) == b"abcdb"


def test_updates_that_crossed_on_their_way_are_put_in_order(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer)
    assert texts(one, [update(2, b"c", FinishReason.LENGTH), update(1, b"b"), update(0, b"a")]) == ["", "", "abc"]
    assert one.finish_reason is FinishReason.LENGTH


def test_tokens_that_come_twice_count_once(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer)
    assert texts(one, [update(0, b"ab"), update(0, b"ab"), update(1, b"bc"), update(3, b"d", FinishReason.LENGTH)]) == ["ab", "", "c", "d"]
    assert bytes(one.output_ids) == b"abcd"


def test_a_restart_forgets_what_the_lost_worker_sent_ahead(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer)
    one.accept(update(0, b"a"), 0.0)
    one.accept(update(2, b"X"), 0.0)
    assert one.has_gap
    one.restart()
    assert not one.has_gap
    assert texts(one, [update(1, b"b"), update(2, b"c")]) == ["ab", "c"]


def test_logprobs_come_with_the_text_that_they_are_of(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer, ["END"])
    shown = []
    for i, byte in enumerate("é!EN".encode()):
        one.accept(update(i, [byte], logprobs=True), 0.0)
        delta = one.take()
        shown.append((delta.text, [entry.offset for entry in delta.logprobs]) if delta else None)
    assert shown == [None, ("é", [0, 0]), ("!", [1]), None, None]
    one.accept(update(5, [EOS], FinishReason.STOP, logprobs=True), 0.0)
    delta = one.take()
    assert delta is not None
    assert (delta.text, [entry.offset for entry in delta.logprobs]) == ("EN", [2, 3])


def test_tokens_of_a_stop_string_have_no_logprobs(tokenizer: Tokenizer) -> None:
    one = choice(tokenizer, ["END"])
    one.accept(update(0, b"aEND", logprobs=True), 0.0)
    delta = one.take()
    assert delta is not None
    assert [entry.token.token_id for entry in delta.logprobs] == [ord("a")]


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=40), stop=st.lists(st.text(min_size=1, max_size=4), max_size=3), data=st.data())
def test_text_does_not_depend_on_how_its_tokens_were_cut_or_ordered(
    tokenizer: Tokenizer, text: str, stop: list[str], data: st.DataObject
) -> None:
    encoded = text.encode()
    whole = choice(tokenizer, stop)
    expected = "".join(texts(whole, [update(0, encoded, FinishReason.LENGTH)]))
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, len(encoded)), max_size=6)), len(encoded)})
    parts = [update(a, encoded[a:b], FinishReason.LENGTH if b == len(encoded) else None) for a, b in itertools.pairwise(cuts)]
    one = choice(tokenizer, stop)
    seen = texts(one, data.draw(st.permutations(parts)))
    assert "".join(seen) == expected
    assert one.output_ids == whole.output_ids
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    assert expected == (text[: min(ends)[1]] if ends else text)
