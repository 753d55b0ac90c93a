"""Are the demo's answers those of transformers? The same checkpoints, tokenized and generated greedily in float32, one by one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polymux.deploy.demo.requests import Ask
from polymux.deploy.demo.summary import Record
from polymux.transport.errors import PolymuxError


@dataclass(frozen=True, slots=True)
class Difference:
    record: Record
    expected: str
    num_expected: int  # tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    num_identical: int
    different: tuple[Difference, ...]


def compare(records: Sequence[Record], paths: Mapping[str, str]) -> Comparison:
    """Text and number of tokens of every finished request against `generate`. Raises PolymuxError when transformers is not installed."""
    try:
        import transformers
    except ImportError:
        raise PolymuxError("--check needs transformers; pip install 'polymux[bench]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import torch

    torch.set_num_threads(1)  # models this small only lose by more
    different = []
    done = [record for record in records if record.state == "done"]
    for model in sorted({record.ask.model for record in done}):
        reference = _Reference(paths[model])
        for record in (one for one in done if one.ask.model == model):
            text, num_tokens = reference.answer(record.ask)
            if (text, num_tokens) != (record.text, record.num_tokens):
                different.append(Difference(record, text, num_tokens))
    return Comparison(len(done) - len(different), tuple(different))


class _Reference:
    """One checkpoint under transformers."""

    def __init__(self, path: str) -> None:
        import torch
        import transformers

        self._torch = torch
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._eos = self._model.generation_config.eos_token_id
        self._answers: dict[tuple[str, bool, int], tuple[str, int]] = {}

    def answer(self, ask: Ask) -> tuple[str, int]:
        """Text and number of tokens, computed once however often it is asked."""
        key = ask.text, ask.is_chat, ask.max_tokens
        if key not in self._answers:
            self._answers[key] = self._generate(ask)
        return self._answers[key]

    def _generate(self, ask: Ask) -> tuple[str, int]:
        if ask.is_chat:
            messages = [{"role": "user", "content": ask.text}]
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = self._tokenizer(text, add_special_tokens=False).input_ids
        else:
            prompt = self._tokenizer(ask.text).input_ids
        ids = self._torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sampling settings of the checkpoint do nothing in a greedy run
            output = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), do_sample=False, max_new_tokens=ask.max_tokens, eos_token_id=self._eos
            )
        tokens = output[0, len(prompt) :].tolist()
        return self._tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)
