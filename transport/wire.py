"""Messages to bytes and back: msgpack arrays `[tag, fields...]`, built from each dataclass's own type hints and checked by them.

Nested dataclasses are plain arrays (the hint says which), enums their values, tuples arrays. There are no maps, no extension types and
no NaN or infinity. Field order is the format: it may only change together with PROTOCOL_VERSION, which the handshake compares.
Whatever bytes come in, `decode` returns a message or raises WireError naming the field.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

import msgpack

from polymux.transport import messages, protocol, rank_messages
from polymux.transport.errors import PolymuxError, WireError
from polymux.transport.units import MIB, PackedIds

MAX_CONTROL_BYTES = 1 * MIB
MAX_BULK_BYTES = 16 * MIB

# A tag, once given, is never given to another message.
_TAGS: dict[int, type] = {
    1: messages.Generate,
    2: messages.Cancel,
    3: messages.Prefill,
    4: messages.Prefilled,
    5: messages.TokenFrame,
    6: messages.Grant,
    7: messages.SequenceUpdate,
    8: messages.ErrorReport,
    9: messages.Peer,
    10: messages.KVLayout,
    11: messages.ModelSpec,
    12: messages.SamplingParams,
    13: messages.TokenLogprobs,
    14: messages.ModelCost,
    15: messages.ModelLoad,
    16: messages.WorkerReport,
    17: messages.WorkerHello,
    18: messages.Admit,
    19: messages.Placement,
    20: messages.Release,
    21: messages.Joined,
    22: messages.Reported,
    23: messages.Span,
    24: messages.LookBack,
    25: messages.WorkerTimeline,
    26: messages.Shard,
    27: messages.RankShape,
    28: messages.EdgeReport,
    64: protocol.Hello,
    65: protocol.Challenge,
    66: protocol.Answer,
    67: protocol.Welcome,
    68: protocol.Refusal,
    69: protocol.Ping,
    70: protocol.Pong,
    71: protocol.EdgeOffer,
    72: protocol.EdgeTerms,
    73: protocol.JoinEdge,
    74: protocol.EdgeOpen,
    75: protocol.Move,
    76: protocol.Commit,
    77: protocol.Failed,
    78: protocol.Ended,
    79: protocol.Released,
    80: protocol.ImageRequest,
    81: protocol.ImageReply,
    82: protocol.HostTierTerms,
    83: protocol.DeviceTerms,
    84: protocol.IpcTerms,
    85: protocol.JoinComm,
    86: protocol.CommJoined,
    96: rank_messages.StartRank,
    97: rank_messages.RankStarted,
    98: rank_messages.LoadImage,
    99: rank_messages.ImageSeen,
    100: rank_messages.HurryImage,
    101: rank_messages.MoveImage,
    102: rank_messages.DropImage,
    103: rank_messages.AskDone,
    104: rank_messages.Done,
    105: rank_messages.StepSlice,
    106: rank_messages.StepModel,
    107: rank_messages.RankFailed,
    108: rank_messages.DecodeModel,
    109: rank_messages.RankMemory,
}
_TAG_OF = {cls: tag for tag, cls in _TAGS.items()}

M = TypeVar("M")
Pack = Callable[[Any], Any]
Unpack = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Codec:
    """`pack` None: the value goes to msgpack as it is."""

    pack: Pack | None
    unpack: Unpack


def encode(message: object, *, limit: int = MAX_CONTROL_BYTES) -> bytes:
    """Raises WireError for a message that is too large, not of ours, or holds what cannot travel."""
    tag = _TAG_OF.get(type(message))
    if tag is None:
        raise WireError(f"{type(message).__name__} is not a message of protocol version {protocol.PROTOCOL_VERSION}")
    try:
        fields = _codec(type(message)).pack
        assert fields is not None
        data: bytes = msgpack.packb([tag, *fields(message)])
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise WireError(f"{type(message).__name__} cannot travel: {error}") from error
    if len(data) > limit:
        raise WireError(f"{type(message).__name__} is {len(data)} bytes; the limit is {limit}")
    return data


def decode(data: bytes | bytearray | memoryview, *, limit: int = MAX_CONTROL_BYTES) -> Any:
    """The message in these bytes, all of them. Raises WireError and nothing else."""
    if len(data) > limit:
        raise WireError(f"a message of {len(data)} bytes; the limit is {limit}")
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {type(error).__name__} {error}"[:200]) from error
    if type(body) is not list or not body or type(body[0]) is not int:
        raise WireError("not a message: it must be an array that begins with its tag")
    cls = _TAGS.get(body[0])
    if cls is None:
        raise WireError(f"unknown message tag {body[0]}; this side speaks protocol version {protocol.PROTOCOL_VERSION}")
    try:
        return _codec(cls).unpack(body[1:])
    except WireError as error:
        raise WireError(f"{cls.__name__}{error.message}") from error


def decode_as(cls: type[M], data: bytes | bytearray | memoryview, *, limit: int = MAX_CONTROL_BYTES) -> M:
    """`decode`, where only one kind of message will do."""
    message = decode(data, limit=limit)
    if type(message) is not cls:
        raise WireError(f"expected {cls.__name__}, got {type(message).__name__}")
    return message


def _wrong(expected: str, value: object) -> WireError:
    return WireError(f": expected {expected}, got {type(value).__name__}")


def _at(where: str, error: WireError) -> WireError:
    return WireError(where + error.message)


def _unpack_int(value: Any) -> Any:
    if type(value) is not int:
        raise _wrong("an integer", value)
    return value


def _unpack_str(value: Any) -> Any:
    if type(value) is not str:
        raise _wrong("a string", value)
    return value


def _unpack_bytes(value: Any) -> Any:
    if type(value) is not bytes:
        raise _wrong("bytes", value)
    return value


def _unpack_bool(value: Any) -> Any:
    if type(value) is not bool:
        raise _wrong("a boolean", value)
    return value


def _unpack_float(value: Any) -> Any:
    if type(value) is int:
        value = float(value)
    if type(value) is not float:
        raise _wrong("a number", value)
    if not math.isfinite(value):
        raise WireError(f": {value} is not a finite number")
    return value


def _pack_float(value: Any) -> Any:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


def _unpack_ids(value: Any) -> Any:
    if type(value) is not bytes:
        raise _wrong("bytes", value)
    if len(value) % 4:
        raise WireError(f": {len(value)} bytes of packed ids are not a whole number of u32s")
    return value


_SCALARS: dict[Any, _Codec] = {
    int: _Codec(None, _unpack_int),
    str: _Codec(None, _unpack_str),
    bytes: _Codec(None, _unpack_bytes),
    bool: _Codec(None, _unpack_bool),
    float: _Codec(_pack_float, _unpack_float),
    PackedIds: _Codec(None, _unpack_ids),
}
_CODECS: dict[Any, _Codec] = {}


def _codec(hint: Any) -> _Codec:
    found = _CODECS.get(hint)
    if found is None:
        found = _CODECS[hint] = _build(hint)
    return found


def _build(hint: Any) -> _Codec:
    if hint in _SCALARS:
        return _SCALARS[hint]
    if isinstance(hint, typing.NewType):
        return _codec(hint.__supertype__)
    if dataclasses.is_dataclass(hint):
        return _dataclass_codec(typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_codec(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _optional_codec(hint)
    if typing.get_origin(hint) is tuple:
        return _tuple_codec(typing.get_args(hint))
    raise TypeError(f"no wire form for {hint}")


def _dataclass_codec(cls: type) -> _Codec:
    hints = typing.get_type_hints(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))
    codecs = [_codec(hints[name]) for name in names]
    packs = [(i, codec.pack) for i, codec in enumerate(codecs) if codec.pack]
    unpacks = [codec.unpack for codec in codecs]
    get = _getter(names)

    def pack(message: Any) -> Any:
        if type(message) is not cls:
            raise TypeError(f"expected {cls.__name__}, got {type(message).__name__}")
        values = get(message)
        for i, one in packs:
            values[i] = one(values[i])
        return values

    def unpack(values: Any) -> Any:
        if type(values) is not list:
            raise _wrong(f"an array of {len(names)} fields", values)
        if len(values) != len(names):
            raise WireError(f": {len(values)} fields instead of {len(names)}")
        name, fields = "", {}
        try:
            for name, one, value in zip(names, unpacks, values, strict=True):
                fields[name] = one(value)
        except WireError as error:
            raise _at(f".{name}", error) from error
        try:
            return cls(**fields)
        except (PolymuxError, ValueError) as error:
            raise WireError(f": {error}") from error

    return _Codec(pack, unpack)


def _getter(names: tuple[str, ...]) -> Callable[[Any], list[Any]]:
    if len(names) < 2:  # attrgetter returns a bare value then
        return lambda message: [getattr(message, name) for name in names]
    get = attrgetter(*names)
    return lambda message: list(get(message))


def _enum_codec(cls: type[enum.Enum]) -> _Codec:
    members = {member.value: member for member in cls}

    def unpack(value: Any) -> Any:
        try:
            return members[value]
        except (KeyError, TypeError):
            raise WireError(f": {str(value)[:40]!r} is not one of {', '.join(map(str, members))}") from None

    return _Codec(lambda member: member.value, unpack)


def _optional_codec(hint: Any) -> _Codec:
    inner_hints = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if len(inner_hints) != 1 or len(typing.get_args(hint)) != 2:
        raise TypeError(f"no wire form for {hint}: only `X | None` has one")
    inner = _codec(inner_hints[0])
    pack_inner, unpack_inner = inner.pack, inner.unpack
    pack = None if pack_inner is None else lambda value: None if value is None else pack_inner(value)
    return _Codec(pack, lambda value: None if value is None else unpack_inner(value))


def _tuple_codec(args: tuple[Any, ...]) -> _Codec:
    if len(args) == 2 and args[1] is Ellipsis:
        return _sequence_codec(args[0])
    codecs = [_codec(arg) for arg in args]
    packs = [codec.pack or (lambda value: value) for codec in codecs]
    unpacks = [codec.unpack for codec in codecs]

    def unpack(values: Any) -> Any:
        if type(values) is not list or len(values) != len(unpacks):
            raise _wrong(f"an array of {len(unpacks)}", values)
        return tuple(_each(values, unpacks))

    if all(codec.pack is None for codec in codecs):
        return _Codec(None, unpack)
    return _Codec(lambda values: [pack(value) for pack, value in zip(packs, values, strict=True)], unpack)


def _sequence_codec(item: Any) -> _Codec:
    codec = _codec(item)
    pack_one, unpack_one = codec.pack, codec.unpack
    plain: set[type] | None = {item} if item in (int, str) else None  # checked in one pass at C speed

    def unpack(values: Any) -> Any:
        if type(values) is not list:
            raise _wrong("an array", values)
        if plain is not None and plain.issuperset(map(type, values)):
            return tuple(values)
        return tuple(_each(values, [unpack_one] * len(values)))

    return _Codec(None if pack_one is None else lambda values: [pack_one(value) for value in values], unpack)


def _each(values: list[Any], unpacks: list[Unpack]) -> list[Any]:
    done: list[Any] = []
    try:
        for value, one in zip(values, unpacks, strict=True):
            done.append(one(value))
    except WireError as error:
        raise _at(f"[{len(done)}]", error) from error
    return done
