"""The demo models shipped in the repository: they load, they fit, and they are as good as their cards say."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from polymux.deploy.demo import corpus, train

MODELS = Path(train.__file__).parent / "models"
NAMES = [f"{family}-{size}" for family, size in train.SHAPES]
MAX_BYTES = 12_000_000  # of the four checkpoints with their tokenizers


@cache
def load(name: str) -> tuple[Any, Tokenizer]:
    """The model in fp32, as its card's figures were measured, and its tokenizer."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))


def answer(name: str, question: str) -> str:
    model, tokenizer = load(name)
    return train.sample(model, train.FAMILIES[name.partition("-")[0]], tokenizer, question)


@cache
def known_words() -> frozenset[str]:
    return frozenset(word for document in corpus.collect() for word in re.findall(r"[a-z]+", document.text.lower()))


def test_the_four_models_fit_their_budget() -> None:
    files = [MODELS / name / file for name in NAMES for file in ("model.safetensors", "tokenizer.json")]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


@pytest.mark.parametrize("family", sorted(train.FAMILIES))
def test_a_draft_shares_its_targets_tokenizer(family: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODELS / f"{family}-small" / file).read_bytes() == (MODELS / f"{family}-large" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loads_whole_and_gives_finite_logits(name: str) -> None:
    model, tokenizer = load(name)
    ids = torch.tensor([tokenizer.encode("def join(a, *p):").ids])
    logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], tokenizer.get_vocab_size())
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_chat_template_of_the_checkpoint_is_the_one_trained_on(name: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / name)
    family = train.FAMILIES[name.partition("-")[0]]
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.chat_template == family.template
    assert prompt.endswith(("assistant<|end_header_id|>\n\n", "<|im_start|>assistant\n"))
    text = "def join(a, *p):\n    return 'é'"
    assert tokenizer(text).input_ids == load(name)[1].encode(text).ids


@pytest.mark.parametrize("name", NAMES)
def test_generation_ends_at_the_end_of_the_turn_or_of_the_text(name: str) -> None:
    config = json.loads((MODELS / name / "generation_config.json").read_text())
    family = train.FAMILIES[name.partition("-")[0]]
    tokenizer = load(name)[1]
    assert config["eos_token_id"] == [tokenizer.token_to_id(family.end_of_turn), tokenizer.token_to_id(family.end_of_text)]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_states_the_perplexity_that_the_weights_have(name: str) -> None:
    card = (MODELS / name / "README.md").read_text()
    figures = re.search(r"bits per byte \| tokens \| bytes \|\n\|.*\|\n\| ([\d.]+) \| ([\d.]+) \|", card)
    assert figures is not None
    texts = (MODELS / "heldout.txt").read_text().split(corpus.HELD_OUT_SEPARATOR)
    measured = train.evaluate(load(name)[0], train.FAMILIES[name.partition("-")[0]], load(name)[1], texts)
    assert measured.per_token == pytest.approx(float(figures[1]), rel=0.01)
    assert measured.bits_per_byte == pytest.approx(float(figures[2]), rel=0.01)
    assert measured.bits_per_byte < 2.0


def test_no_held_out_text_is_in_the_training_text() -> None:
    documents, held_out = corpus.hold_out(corpus.collect())
    training = {" ".join(text.split()) for text in corpus.entries(documents)}
    assert 10_000 < sum(len(text.encode()) for text in held_out) <= corpus.HELD_OUT_BYTES
    assert not training & {" ".join(text.split()) for text in held_out}


def test_the_corpus_is_the_same_each_time() -> None:
    assert corpus.collect() == corpus.collect()


@pytest.mark.parametrize("question", ["What does os.path.join do?", "Describe the for statement"])
@pytest.mark.parametrize("name", NAMES)
def test_a_greedy_answer_reads_like_documentation(name: str, question: str) -> None:
    text = answer(name, question)
    words = re.findall(r"[a-z]+", text.lower())
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    assert len(words) >= 12
    assert len(set(trigrams)) >= 0.8 * len(trigrams), text
    assert sum(len(word) for word in words if word in known_words()) >= 0.95 * sum(len(word) for word in words), text
    assert "\ufffd" not in text


def test_the_large_models_recite_what_they_saw_most() -> None:
    for name in ("llama-large", "qwen3-large"):
        assert "Join two or more pathname components" in answer(name, "What does os.path.join do?")
        assert "Return the number of items in a container" in answer(name, "What does len do?")
