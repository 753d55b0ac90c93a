"""Token ids to text, a token at a time: what has been given out is never taken back, and all of it together is what decoding at once gives.

Text is given out as soon as no later token can change it. A byte-level tokenizer's character waits for its last byte. A run of byte tokens
of the other kind waits for its end, since one wrong byte turns the whole run into U+FFFD.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from polymux.actors.token_pieces import TokenPieces


class Detokenizer(Protocol):
    """One sequence's text. `text_len` counts the characters given out: read before `push`, it is the token's offset in the text."""

    @property
    def text_len(self) -> int: ...

    def push(self, token_id: int) -> str:
        """Take the next token; what it settles of the text. Constant time, but for bytes held back."""
        ...

    def finish(self) -> str:
        """No token follows: the rest of the text."""
        ...


def detokenizer(pieces: TokenPieces, skip_special_tokens: bool) -> Detokenizer:
    skipped = pieces.special_ids if skip_special_tokens else frozenset[int]()
    return ByteLevelDetokenizer(pieces, skipped) if pieces.rules.is_byte_level else PieceDetokenizer(pieces, skipped)


class ByteLevelDetokenizer:
    """For tokens that are bytes."""

    def __init__(self, pieces: TokenPieces, skipped: frozenset[int]) -> None:
        self.text_len = 0
        self._pieces = pieces
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        piece = None if token_id in self._skipped else self._pieces.piece(token_id)
        return self._count(self._decoder.decode(piece[0])) if piece else ""

    def finish(self) -> str:
        return self._count(self._decoder.decode(b"", final=True))

    def _count(self, text: str) -> str:
        self.text_len += len(text)
        return text


class PieceDetokenizer:
    """For tokens that are text, or single bytes where the vocabulary lacks a character."""

    def __init__(self, pieces: TokenPieces, skipped: frozenset[int]) -> None:
        self.text_len = 0
        self._pieces = pieces
        self._skipped = skipped
        self._is_first = True
        self._run = bytearray()  # of byte tokens
        self._to_strip = pieces.rules.strip_count

    def push(self, token_id: int) -> str:
        read = self._pieces.opening if self._is_first else self._pieces.piece
        piece = None if token_id in self._skipped else read(token_id)
        if piece is None:
            return ""
        self._is_first = False
        data, is_byte = piece
        if is_byte:
            self._run += data
            return ""
        return self._give(self._end_run() + data.decode())

    def finish(self) -> str:
        return self._give(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _give(self, text: str) -> str:
        while text and self._to_strip:
            if text[0] != self._pieces.rules.strip:
                self._to_strip = 0
                break
            text, self._to_strip = text[1:], self._to_strip - 1
        self.text_len += len(text)
        return text
