"""Text to token ids and back, with a checkpoint's own tokenizer.json and chat template. For the front door: imports neither torch nor ray.

Ids and texts are those of transformers' tokenizer of the same directory, whose settings in tokenizer_config.json are applied here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from polymux.actors.chat_template import ChatTemplate, Message, load_templates
from polymux.actors.detokenizer import Detokenizer, detokenizer
from polymux.actors.token_pieces import TokenPieces
from polymux.actors.weights.json_file import read_object
from polymux.transport.errors import CheckpointError, InvalidRequest

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Thread-safe. `special_tokens` are those that the checkpoint names, as chat templates know them: `bos_token` and so on."""

    def __init__(self, backend: tokenizers.Tokenizer, templates: Mapping[str, str], config: Mapping[str, Any], origin: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = dict(_special_tokens(config))
        _add_tokens(backend, config, list(self.special_tokens.values()))
        _add_ends(backend, config, self.special_tokens)
        self._backend = backend
        self._pieces = TokenPieces(backend, origin)
        self._chat_template = ChatTemplate(templates, self.special_tokens, origin)
        self.has_chat_template = bool(templates)

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint directory. Raises CheckpointError naming the file and the fix."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; save the tokenizer there with transformers' AutoTokenizer and save_pretrained")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file}: is not a tokenizer ({error}); download it again") from error
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).is_file():
                config |= {key: value for key, value in read_object(path / name).items() if value is not None}
        return cls(backend, load_templates(path), config, str(path))

    @property
    def vocab_size(self) -> int:
        """Tokens, with the added ones. A model's vocabulary may be larger: the ids past this one have no text."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """With special tokens, as for a completion's prompt: what the tokenizer puts around a text, such as a beginning-of-text token.

        Raises InvalidRequest, of the parameter `prompt`, for a text that is not Unicode.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise InvalidRequest("prompt: has lone surrogates, which no text has; send valid Unicode", param="prompt") from None

    def count(self, text: str, add_special_tokens: bool = True) -> int:
        return len(self.encode(text, add_special_tokens))

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; see `ChatTemplate.render`."""
        return self._chat_template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation. The template has written every special token, so none is added. Raises as `ChatTemplate.render`."""
        text = self.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)
        try:
            return self.encode(text, add_special_tokens=False)
        except InvalidRequest as error:
            raise InvalidRequest(error.message.replace("prompt", "messages", 1), param="messages") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """For one sequence's tokens as they come; its text is what `decode` would give of all of them."""
        return detokenizer(self._pieces, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun; b"" for an id without a token. May be part of a character."""
        piece = self._pieces.piece(token_id)
        return piece[0] if piece else b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode(errors="replace")


def _special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of the special tokens, each declared as a text or as an object with its `content`."""
    extra = config.get("extra_special_tokens")
    named = [(name, config.get(name)) for name in NAMED] + (list(extra.items()) if isinstance(extra, dict) else [])
    for name, value in named:
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield name, text


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: list[str]) -> None:
    """Make special what the configuration calls special, and add what only the configuration has."""
    declared = config.get("added_tokens_decoder")
    for _, token in sorted((declared or {}).items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            backend.add_tokens([AddedToken(**{key: value for key, value in token.items() if key != "__type"})])
    extra = config.get("extra_special_tokens")
    more = [*(extra if isinstance(extra, list) else []), *(config.get("additional_special_tokens") or [])]
    special = special + [token["content"] if isinstance(token, dict) else token for token in more]
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in dict.fromkeys(special) if text not in known])


def _add_ends(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """`add_bos_token` and `add_eos_token` replace what tokenizer.json puts around a text; without either it stays."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
    eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
    ends = [(text, backend.token_to_id(text)) for text in dict.fromkeys((bos, eos)) if text is not None]
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    backend.post_processor = TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=ends)
