"""Text to token ids and back, with a checkpoint's own tokenizer.json and chat template. For the front door: imports neither torch nor ray.

Ids and texts are those of transformers' tokenizer of the same directory, whose settings in tokenizer_config.json are applied here too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from polymux.actors.chat_template import ChatTemplate, Message, load_templates
from polymux.actors.detokenizer import Detokenizer, detokenizer
from polymux.actors.token_pieces import TokenPieces
from polymux.actors.weights.json_file import read_object, read_text
from polymux.transport.errors import CheckpointError, InvalidRequest

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Thread-safe. `special_tokens` are those that the checkpoint names, as chat templates know them: `bos_token` and so on."""

    def __init__(self, backend: tokenizers.Tokenizer, templates: Mapping[str, str], config: Mapping[str, Any], origin: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        self.special_tokens = dict(_special_tokens(config))
        try:
            _add_tokens(backend, config, self.special_tokens.values())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{origin}: tokenizer_config.json declares its tokens wrongly ({error!r}); download it again") from error
        self._backend = backend
        self._pieces = TokenPieces(backend, origin)
        self._chat_template = ChatTemplate(templates, self.special_tokens, origin)
        self.has_chat_template = bool(templates)

    @classmethod
    def open(cls, path: str | Path, chat_template: str | Path | None = None) -> Tokenizer:
        """The tokenizer of a checkpoint directory, with that Jinja file in the place of its chat template where one is given.

        Raises CheckpointError naming the file and the fix.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; save the tokenizer there with transformers' AutoTokenizer and save_pretrained")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file}: is not a tokenizer ({error}); download it again") from error
        templates = load_templates(path) if chat_template is None else {"default": read_text(Path(chat_template))}
        return cls(backend, templates, _read_config(path), str(path))

    @property
    def vocab_size(self) -> int:
        """Tokens, with the added ones. A model's vocabulary may be larger: the ids past this one have no text."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def longest_token(self) -> int:
        """Characters of the longest token as the vocabulary spells it: at least those of its text. Looks at each token."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """With special tokens, as for a completion's prompt: what the tokenizer puts around a text, such as a beginning-of-text token.

        Raises InvalidRequest, of the parameter `prompt`, for a text that is not Unicode.
        """
        try:
            # A batch of one gives the same ids without offsets, which nobody needs, and lets other threads run meanwhile.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
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
    """Name and text of each special token that has a name: the usual ones first, then those that only this model has."""
    names = [*NAMED, *(name for name in config if name.endswith("_token") and name not in NAMED)]
    extra = config.get("extra_special_tokens")
    for name, value in [*((name, config.get(name)) for name in names), *(extra.items() if isinstance(extra, dict) else ())]:
        text = _text_of(value)
        if text is not None:
            yield name, text


def _text_of(token: Any) -> str | None:
    """A token is declared as its text, or as an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Collection[str]) -> None:
    """Bring tokenizer.json up to tokenizer_config.json, which may add tokens and change flags. A token with a name is special."""
    known = {token.content: repr(token) for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder")
    if declared:
        tokens = [_declared(declared[at]) for at in sorted(declared, key=int)]
    else:
        tokens = list(backend.get_added_tokens_decoder().values())
    for token in tokens:
        token.special = token.special or token.content in named
    tokens = [token for token in tokens if repr(token) != known.get(token.content)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    texts = dict.fromkeys([*named, *(map(_text_of, extra) if isinstance(extra, list) else ())])
    met = {*known, *(token.content for token in tokens)}
    backend.add_tokens([*tokens, *(AddedToken(text, special=True) for text in texts if text is not None and text not in met)])


def _declared(token: Mapping[str, Any]) -> AddedToken:
    return AddedToken(token["content"], **{flag: value for flag, value in token.items() if flag not in ("content", "__type")})


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; where an old one does not list added tokens, special_tokens_map.json has the last word on the special ones."""
    config = read_object(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    if "added_tokens_decoder" not in config and (path / "special_tokens_map.json").is_file():
        config |= read_object(path / "special_tokens_map.json")
    return config
