"""Every message survives the wire; no bytes whatever raise anything but WireError."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import time
import types
import typing
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.transport import messages, protocol, rank_messages, wire
from polymux.transport.errors import WireError
from polymux.transport.messages import Cancel, ErrorReport, Prefilled, SamplingParams, SequenceUpdate, TokenFrame
from polymux.transport.units import Epoch, PackedIds, SequenceId, WorkerId, pack_ids
from polymux.transport.wire import MAX_CONTROL_BYTES, decode, decode_as, encode

MESSAGES = sorted((cls for cls in wire._TAG_OF), key=lambda cls: cls.__name__)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
    bool: st.booleans(),
    PackedIds: st.lists(st.integers(0, 2**32 - 1), max_size=10).map(pack_ids),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type hint."""
    if hint in SCALARS:
        return SCALARS[hint]
    if isinstance(hint, typing.NewType):
        return values(hint.__supertype__)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(typing.cast(type, hint), **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if arg is type(None) else values(arg) for arg in args))
    assert typing.get_origin(hint) is tuple, hint
    if args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=4).map(tuple)
    return st.tuples(*map(values, args))


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_message_comes_back_equal_and_of_equal_types(cls: type) -> None:
    @settings(max_examples=12, deadline=None, database=None)
    @given(values(cls))
    def round_trip(message: Any) -> None:
        back = decode(encode(message))
        assert back == message
        assert repr(back) == repr(message)

    round_trip()


def test_every_message_that_crosses_a_process_has_a_tag() -> None:
    here = [member for module in (messages, protocol, rank_messages) for _, member in inspect.getmembers(module, inspect.isclass)]
    crossing = {cls for cls in here if dataclasses.is_dataclass(cls)}
    assert len(crossing) > 30
    assert {cls.__name__ for cls in crossing} == {cls.__name__ for cls in wire._TAG_OF}


@settings(max_examples=120, deadline=None, database=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_wire_errors(data: bytes) -> None:
    with suppress(WireError):
        decode(data)


@settings(max_examples=120, deadline=None, database=None)
@given(st.data())
def test_damaged_messages_decode_or_raise_wire_errors(data: st.DataObject) -> None:
    message = data.draw(values(data.draw(st.sampled_from(MESSAGES))))
    damaged = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        at = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        if kind == "flip" and damaged:
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del damaged[at:]
        else:
            damaged[at:at] = data.draw(st.binary(max_size=6))
    try:
        back = decode(bytes(damaged))
    except WireError:
        return
    assert decode(encode(back)) == back


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=120, deadline=None, database=None)
@given(st.sampled_from(sorted(wire._TAGS)), st.lists(JSONISH, max_size=14))
def test_well_formed_msgpack_of_wrong_types_raises_only_wire_errors(tag: int, fields: list[Any]) -> None:
    try:
        message = decode(msgpack.packb([tag, *fields]))
    except WireError:
        return
    assert type(message) is wire._TAGS[tag]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),  # an array of four thousand million
        (b"\xc6\xff\xff\xff\xff", "not msgpack"),  # as many bytes
        (b"\x91" * 100_000, "not msgpack"),  # nested too deep
        (encode(protocol.Ping()) + b"\0", "not msgpack"),  # trailing bytes
        (msgpack.packb(msgpack.ExtType(1, b"x")), "not msgpack"),
        (msgpack.packb([2, msgpack.ExtType(1, b"x"), "r"]), "not msgpack"),
        (msgpack.packb([2, {"a": 1}, "r"]), "not msgpack"),
        (msgpack.packb({1: 2}), "not msgpack"),
        (msgpack.packb([]), "begins with its tag"),
        (msgpack.packb([True]), "begins with its tag"),
        (msgpack.packb([63]), "unknown message tag 63"),
        (msgpack.packb([2, "s"]), "Cancel: 1 fields instead of 2"),
        (msgpack.packb([2, "s", 5]), "Cancel.reason: expected a string, got int"),
        (msgpack.packb([2, "s", b"r"]), "Cancel.reason: expected a string, got bytes"),
        (msgpack.packb([4, "s", True, None]), "Prefilled.token_id: expected an integer, got bool"),
        (msgpack.packb([4, "s", 1, "done"]), "Prefilled.finish_reason: 'done' is not one of stop, length"),
        (
            msgpack.packb([5, "w", 1, [["s", 0, [1], [], None, None, 0, False], ["s", 0, [1, "x"], [], None, None, 0, False]]]),
            r"updates\[1\].token_ids\[1\]",
        ),
        (msgpack.packb([13, 1, math.nan, []]), "TokenLogprobs.logprob: nan is not a finite number"),
        (msgpack.packb([13, 1, math.inf, []]), "is not a finite number"),
        (msgpack.packb([13, 1, 0.5, [[1, 0.5, 2]]]), r"TokenLogprobs.top\[0\]: expected an array of 2"),
        (msgpack.packb([6, 1, "h", b"123", 1, 1]), "Grant.block_ids: 3 bytes of packed ids"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        decode(data)


def test_only_the_expected_kind_is_taken() -> None:
    with pytest.raises(WireError, match="expected Cancel, got Ping"):
        decode_as(Cancel, encode(protocol.Ping()))


def test_what_cannot_travel_is_refused_at_the_sender() -> None:
    params = SamplingParams(max_tokens=1, temperature=math.nan)
    with pytest.raises(WireError, match="SamplingParams cannot travel: nan"):
        encode(params)
    with pytest.raises(WireError, match="cannot travel"):
        encode(Prefilled(sequence_id=SequenceId("s"), token_id=2**64, finish_reason=None))
    with pytest.raises(WireError, match="is not a message"):
        encode(object())
    with pytest.raises(WireError, match="the limit is"):
        encode(ErrorReport(name="x", message="y" * (MAX_CONTROL_BYTES + 1)))


def test_a_message_above_the_limit_is_refused_unread() -> None:
    data = encode(ErrorReport(name="x", message="y" * 2000))
    with pytest.raises(WireError, match="the limit is 1000"):
        decode(data, limit=1000)


def test_an_integer_in_a_float_field_becomes_a_float() -> None:
    back = decode(encode(SamplingParams(max_tokens=1, temperature=1)))
    assert type(back.temperature) is float


def test_a_frame_of_64_updates_costs_well_under_a_millisecond() -> None:
    updates = tuple(SequenceUpdate(sequence_id=SequenceId(f"req-{i:016x}/0"), index=i, token_ids=(i * 7,)) for i in range(64))
    one = TokenFrame(worker_id=WorkerId("w1"), epoch=Epoch(3), updates=updates)
    decode(encode(one))
    took = []
    for _ in range(30):
        started = time.perf_counter()
        decode(encode(one))
        took.append(time.perf_counter() - started)
    assert min(took) < 1e-3
