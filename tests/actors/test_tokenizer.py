"""Tokenizers against transformers, and streamed text against text decoded at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from polymux.actors.detokenizer import Detokenizer
from polymux.actors.tokenizer import Tokenizer
from polymux.transport.errors import CheckpointError, InvalidRequest

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "models"
TEXTS = [
    "",
    " ",
    "Hello world, hello  worlds!\n\n\tdef f(x):\n    return x ** 2  # naïve café",
    "你好，世界。🙂👩‍👩‍👧 ﷽ ok",
    "<|end|> is not <s> here </s>, nor <|begin|>",
    "  leading and trailing  ",
    "a\x00b\ufffdc\u2581d",
]
CORPUS = [text * 2 for text in TEXTS] + ["the quick brown fox jumps over the lazy dog"] * 3
SPECIALS = ["<|begin|>", "<|end|>"]


def _byte_level() -> tokenizers.Tokenizer:
    """As Llama 3's and Qwen's: bytes, a splitting pattern, a beginning-of-text token; and added tokens that are not special."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False)
    )
    made.add_tokens(
        [AddedToken("<tool call>", normalized=False), AddedToken("naïve", normalized=False), AddedToken("你好", normalized=False)]
    )
    bos = [("<|begin|>", made.token_to_id("<|begin|>"))]
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B:1", special_tokens=bos)
    return made


def _pieces(decoder: Any, legacy: bool) -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: sentencepiece pieces with byte tokens; `legacy` normalizes where newer ones pre-tokenize."""
    seed = tokenizers.Tokenizer(models.BPE())
    seed.pre_tokenizer = pre_tokenizers.Metaspace()
    seed.train_from_iterator(CORPUS[2:3] + CORPUS[-3:], trainers.BpeTrainer(vocab_size=90, show_progress=False))
    state = json.loads(seed.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(state["vocab"], key=state["vocab"].get)]
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in state["merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoder
    made.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    made.add_tokens([AddedToken("[INST]", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)])
    return made


SENTENCEPIECE = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
BACKENDS = {
    "byte-level": _byte_level(),
    "sentencepiece": _pieces(SENTENCEPIECE, legacy=True),
    "no-strip": _pieces(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), legacy=False),
    "metaspace": _pieces(decoders.Metaspace(prepend_scheme="first"), legacy=False),
    "metaspace-never": _pieces(decoders.Metaspace(prepend_scheme="never"), legacy=False),
}
TOKENIZERS = {name: Tokenizer(backend, {}, {}, name) for name, backend in BACKENDS.items()}
NAMES = pytest.mark.parametrize("name", BACKENDS)


def _save(path: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    backend.save(str(path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps(named | config))
    return path


def _stream(streamed: Detokenizer, ids: list[int]) -> str:
    return "".join([streamed.push(token_id) for token_id in ids]) + streamed.finish()


# -- ids and texts ----------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "byte-level": ("byte-level", {"bos_token": "<|begin|>", "eos_token": "<|end|>"}),
    "declared-as-objects": ("byte-level", {"eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True}}),
    "without-bos": ("byte-level", {"bos_token": "<|begin|>", "add_bos_token": False}),
    "with-both-ends": ("byte-level", {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True, "add_eos_token": True}),
    "a-token-of-its-own": ("byte-level", {"image_token": "<|image|>", "extra_special_tokens": {"end_token": "<|end|>"}}),
    "changed-flags": ("byte-level", {"added_tokens_decoder": {"341": {"content": "naïve", "special": True, "lstrip": True}}}),
    "tokens-in-the-configuration-only": ("byte-level", {"added_tokens_decoder": {"343": {"content": "<|new|>", "special": False}}}),
    "split-special-tokens": ("byte-level", {"eos_token": "<|end|>", "split_special_tokens": True}),
    "new-special-tokens": (
        "byte-level",
        {"eos_token": "<|new|>", "pad_token": "naïve", "extra_special_tokens": ["<tool call>", "<|more|>"]},
    ),
    "sentencepiece": ("sentencepiece", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "no-strip": ("no-strip", {"bos_token": "<s>", "eos_token": "</s>"}),
    "metaspace": ("metaspace", {"bos_token": "<s>", "eos_token": "</s>"}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    from transformers import AutoTokenizer

    backend, config = CONFIGS[case]
    theirs = AutoTokenizer.from_pretrained(_save(tmp_path, BACKENDS[backend], **config))
    ours = Tokenizer.open(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in [*TEXTS, "<|new|><|more|> <tool call>naïve"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.count(text, add_special_tokens=special) == len(ids)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
                assert _stream(ours.detokenizer(skip), ids) == ours.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("path", sorted(DEMO.glob("*/tokenizer.json")), ids=lambda path: path.parent.name)
def test_the_demo_models_have_transformers_ids_and_texts(path: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.open(path.parent), AutoTokenizer.from_pretrained(path.parent)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert _stream(ours.detokenizer(), ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": " What is a list? 你好 "}, {"role": "assistant", "content": "A sequence."}]
    for generation in (True, False):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=generation)["input_ids"]
        assert ours.encode_chat(messages, add_generation_prompt=generation) == expected


def test_a_chat_is_encoded_without_a_second_beginning(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ours = Tokenizer.open(_save(tmp_path, _byte_level(), bos_token="<|begin|>", eos_token="<|end|>", chat_template=template))
    ids = ours.encode_chat([{"role": "user", "content": "hi"}])
    assert ours.render_chat([{"role": "user", "content": "hi"}]) == "<|begin|>hi<|end|>"
    assert ids == [0, *ours.encode("hi", add_special_tokens=False), 1]
    assert ours.has_chat_template


def test_what_tokenizer_json_cuts_and_pads_is_not_cut_or_padded(tmp_path: Path) -> None:
    backend = _byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=300)
    assert Tokenizer.open(_save(tmp_path, backend)).encode(TEXTS[2]) == TOKENIZERS["byte-level"].encode(TEXTS[2])


def test_a_text_that_is_not_unicode_is_refused_by_parameter(tmp_path: Path) -> None:
    ours = Tokenizer.open(_save(tmp_path, _byte_level(), chat_template="{{ messages[0]['content'] }}"))
    with pytest.raises(InvalidRequest) as caught:
        ours.encode("a\ud800")
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        ours.encode_chat([{"role": "user", "content": "a\ud800"}])
    assert caught.value.param == "messages"


# -- streaming --------------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 420), max_size=40)  # a few past every vocabulary here
BYTE_RUNS = st.lists(st.one_of(st.sampled_from("é你🙂".encode()).map(lambda byte: byte + 3), st.integers(0, 420)), max_size=40)


@NAMES
@settings(max_examples=200, deadline=None)
@given(ids=st.one_of(IDS, BYTE_RUNS), skip=st.booleans())
@example(ids=[3 + byte for byte in "你".encode()] + [3 + 0xFF], skip=True)
@example(ids=[3 + byte for byte in "你".encode()[:2]], skip=True)
@example(ids=[3 + 0x20, 3 + 0x20], skip=True)
def test_streamed_text_is_the_text_decoded_at_once(name: str, ids: list[int], skip: bool) -> None:
    ours = TOKENIZERS[name]
    assert _stream(ours.detokenizer(skip), ids) == ours.decode(ids, skip_special_tokens=skip)


@NAMES
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_streamed_text_of_real_text_never_shows_part_of_a_character(name: str, text: str) -> None:
    """What is shown is at each moment the beginning of what decoding at once gives, which has no U+FFFD that the text has not."""
    ours = TOKENIZERS[name]
    ids = ours.encode(text)
    whole, streamed, shown = ours.decode(ids), ours.detokenizer(), ""
    for token_id in ids:
        assert streamed.text_len == len(shown)
        shown += streamed.push(token_id)
        assert whole.startswith(shown)
    assert streamed.text_len == len(shown)
    assert shown + streamed.finish() == whole
    assert streamed.text_len == len(whole)


def test_a_character_waits_for_its_last_byte_and_no_longer() -> None:
    ours = TOKENIZERS["byte-level"]
    ids = [token_id for byte in "é🙂".encode() for token_id in [_byte_token(byte)]]
    streamed = ours.detokenizer()
    assert [streamed.push(token_id) for token_id in ids] == ["", "é", "", "", "", "🙂"]


def _byte_token(byte: int) -> int:
    return next(i for i in range(2, 300) if TOKENIZERS["byte-level"].token_bytes(i) == bytes([byte]))


def _id(name: str, token: str) -> int:
    found = BACKENDS[name].token_to_id(token)
    assert found is not None
    return found


def test_an_unfinished_character_is_shown_as_one_replacement_at_the_end() -> None:
    streamed = TOKENIZERS["byte-level"].detokenizer()
    assert [streamed.push(_byte_token(byte)) for byte in "🙂".encode()[:3]] == ["", "", ""]
    assert streamed.finish() == "\ufffd"


def test_a_run_of_byte_tokens_is_decided_where_it_ends() -> None:
    streamed = TOKENIZERS["sentencepiece"].detokenizer()
    ids = [3 + byte for byte in "你".encode()]
    assert [streamed.push(token_id) for token_id in ids] == ["", "", ""]
    assert streamed.push(_id("sentencepiece", "▁the")) == "你 the"


def test_token_bytes_join_to_the_text() -> None:
    ours = TOKENIZERS["byte-level"]
    text = TEXTS[3] + TEXTS[5]
    assert b"".join(map(ours.token_bytes, ours.encode(text, add_special_tokens=False))).decode() == text
    pieces = TOKENIZERS["sentencepiece"]
    assert b"".join(map(pieces.token_bytes, pieces.encode(text, add_special_tokens=False))).decode() == " " + text


def test_token_text_of_part_of_a_character_is_a_replacement() -> None:
    assert TOKENIZERS["sentencepiece"].token_bytes(3 + 0xE4) == b"\xe4"
    assert TOKENIZERS["sentencepiece"].token_text(3 + 0xE4) == "\ufffd"
    assert TOKENIZERS["byte-level"].token_text(0) == "<|begin|>"
    assert TOKENIZERS["byte-level"].token_bytes(10**9) == b""


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "What"}}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    "declared", [["x"], {"one": {"content": "x"}}, {"1": "x"}, {"1": {"content": 3}}, {"1": {"content": "x", "special": "yes"}}, {"1": {}}]
)
def test_tokens_that_are_declared_wrongly_are_refused(tmp_path: Path, declared: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json declares its tokens wrongly"):
        Tokenizer.open(_save(tmp_path, _byte_level(), added_tokens_decoder=declared))


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace()]),
    ],
    ids=str,
)
def test_a_decoder_that_cannot_be_streamed_faithfully_is_refused(tmp_path: Path, decoder: Any) -> None:
    backend = _byte_level()
    backend.decoder = decoder
    with pytest.raises(CheckpointError, match="cannot be streamed"):
        Tokenizer.open(_save(tmp_path, backend))


def test_the_tokenizer_imports_neither_torch_nor_ray() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'ray', 'transformers', 'numpy'])); "
    use = f"from polymux.actors.tokenizer import Tokenizer; print(Tokenizer.open({str(DEMO / 'llama-small')!r}).count('hi'))"
    done = subprocess.run([sys.executable, "-c", blocked + use], check=True, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) >= 1
