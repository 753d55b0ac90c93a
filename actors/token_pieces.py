"""What each token adds to a text, by the kind of decoder that a tokenizer.json declares. The ground that streaming stands on.

Two kinds serve the models here. *Byte-level* (GPT-2's, so Llama 3's and Qwen's): every token is bytes, and the text is their UTF-8. *Pieces
with byte fallback* (sentencepiece's, so Llama 2's and Mistral's): a token is text, or one byte written `<0xE4>`; a run of such bytes is
text when the whole run is UTF-8, else one U+FFFD each. A decoder of any other kind is refused: its text could not be streamed faithfully.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import tokenizers

from polymux.transport.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How tokens become text. `replacements` apply to each token; the rest is of the pieces kind."""

    is_byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    first_drops: str = ""  # removed from the first token: sentencepiece's mark of a space that was never typed
    has_byte_tokens: bool = False
    strip: str = ""  # removed from the start of the text, up to strip_count times
    strip_count: int = 0


def rules_of(tokenizer: tokenizers.Tokenizer, origin: str) -> Rules:
    """Read the decoder. Raises CheckpointError, naming `origin`, for one of another kind."""
    declared: dict[str, Any] = {"type": "nothing"} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    stages: list[dict[str, Any]] = declared["decoders"] if declared["type"] == "Sequence" else [declared]
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"]:
        return Rules(is_byte_level=True)
    replacements: list[tuple[str, str]] = []
    rules: dict[str, Any] = {}
    for place, stage in enumerate(stages):
        before = kinds[:place]
        match stage:
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if set(before) <= {"Replace"}:
                replacements.append((pattern, content))
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme} if not before:
                replacements.append((mark, " "))
                rules["first_drops"] = "" if scheme == "never" else mark
            case {"type": "ByteFallback"} if set(before) <= {"Replace", "Metaspace"}:
                rules["has_byte_tokens"] = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": content, "start": count, "stop": 0} if before[-1:] == ["Fuse"]:
                rules |= {"strip": content, "strip_count": count}
            case _:
                raise CheckpointError(
                    f"{origin}: its tokenizer's decoder, {' > '.join(kinds)}, cannot be streamed; polymux knows ByteLevel, and Metaspace "
                    "or Replace > ByteFallback > Fuse > Strip"
                )
    return Rules(is_byte_level=False, replacements=tuple(replacements), **rules)


class TokenPieces:
    """The piece of each token: its bytes, and whether it is a byte token. Worked out once for each id that is met."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str) -> None:
        self.rules = rules_of(tokenizer, origin)
        self.special_ids = frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[bytes, bool] | None] = {}

    def piece(self, token_id: int) -> tuple[bytes, bool] | None:
        """None for an id that no token has, which adds nothing to a text: models pad their vocabularies."""
        if token_id not in self._known:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:
                return None  # and is not kept: there is no end of such ids
            self._known[token_id] = self._make(token)
        return self._known[token_id]

    def opening(self, token_id: int) -> tuple[bytes, bool] | None:
        """The piece of a token that opens a text."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or not self.rules.first_drops:
            return self.piece(token_id)
        return self._make(token.replace(self.rules.first_drops, ""))

    def _make(self, token: str) -> tuple[bytes, bool]:
        if self.rules.is_byte_level:
            mapped = [ALPHABET.get(letter) for letter in token]
            return (token.encode() if None in mapped else bytes(byte for byte in mapped if byte is not None)), False
        for pattern, content in self.rules.replacements:
            token = token.replace(pattern, content)
        match = BYTE_TOKEN.fullmatch(token) if self.rules.has_byte_tokens else None
        return (bytes([int(match[1], 16)]), True) if match else (token.encode(), False)
