"""A checkpoint is refused for anything that is wrong with it, by name, before it is used; and is read without being kept."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.transport.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def _weights(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ArchConfig.from_json(json.dumps(config), "test").expected_tensors()
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def _single(path: Path, weights: dict[str, Tensor] | None = None, **config: Any) -> Path:
    _write(path / "config.json", CONFIG | config)
    save_file(weights or _weights(CONFIG | config), path / "model.safetensors", metadata={"format": "pt"})
    return path


def _sharded(path: Path) -> Path:
    _write(path / "config.json", CONFIG)
    weights = _weights(CONFIG)
    names = sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file({name: weights[name] for name in half}, path / shard)
    _write(path / INDEX, {"weight_map": {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}})
    return path


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return caught.value.message


def _edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    _write(path, values)


def _edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a safetensors header and leave the data as it was."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


# -- what is whole ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_single, _sharded])
def test_a_whole_checkpoint_opens_and_gives_the_tensors_that_were_saved(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    checkpoint = Checkpoint.open(make(tmp_path))
    expected = _weights(CONFIG)
    assert checkpoint.names == tuple(checkpoint.config.expected_tensors())
    for name in checkpoint.names:
        assert checkpoint.tensor(name).dtype == torch.bfloat16
        assert torch.equal(checkpoint.tensor(name), expected[name])
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.config_json == (tmp_path / "config.json").read_text()
    assert not checkpoint.has_tokenizer
    assert not checkpoint.has_chat_template


def test_tensors_are_those_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    weights = {**_weights(CONFIG), "model.norm.weight": torch.randn(16)}
    checkpoint = Checkpoint.open(_single(tmp_path, weights))
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == tensor.dtype


def test_a_checkpoint_that_transformers_sharded_opens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {key: value for key, value in CONFIG.items() if key != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**known)).to(torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.files) > 1
    assert checkpoint.dtype == "float16"
    state = model.state_dict()
    for name in checkpoint.names:
        assert torch.equal(checkpoint.tensor(name), state[name])


def test_dtypes_may_be_mixed_and_the_dtype_is_the_declared_one_else_that_of_most_bytes(tmp_path: Path) -> None:
    weights = {name: t.float() if "norm" in name else t for name, t in _weights(CONFIG).items()}
    assert Checkpoint.open(_single(tmp_path, weights)).dtype == "bfloat16"
    assert Checkpoint.open(_single(tmp_path, weights, torch_dtype="float32")).dtype == "float32"
    assert Checkpoint.open(tmp_path).tensor("model.norm.weight").dtype == torch.float32


def test_superfluous_tensors_of_old_exports_are_left_aside(tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    weights = _weights(tied) | {
        "lm_head.weight": torch.zeros(64, 16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2, dtype=torch.float64),
    }
    checkpoint = Checkpoint.open(_single(tmp_path, weights, tie_word_embeddings=True))
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & set(checkpoint.names)


def test_end_tokens_are_those_of_both_files_and_defaults_those_that_are_set(tmp_path: Path) -> None:
    _single(tmp_path, eos_token_id=[2, 5])
    _write(
        tmp_path / "generation_config.json", {"eos_token_id": [7, 2], "temperature": 0.6, "top_k": 20.0, "top_p": None, "do_sample": True}
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.eos_token_ids == (7, 2, 5)
    assert checkpoint.generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert type(checkpoint.generation_defaults["top_k"]) is int


def test_tokenizer_and_chat_template_are_noticed(tmp_path: Path) -> None:
    _single(tmp_path)
    _write(tmp_path / "tokenizer.json", {})
    _write(tmp_path / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.has_tokenizer
    assert checkpoint.has_chat_template


def test_nothing_stays_open_and_little_stays_in_memory(tmp_path: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    _single(tmp_path, vocab_size=4096, hidden_size=1024, num_hidden_layers=6, intermediate_size=1024)
    num_fds, before = len(list(Path("/proc/self/fd").iterdir())), resident_bytes()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.digest
    largest = max(checkpoint.tensor(name).nbytes for name in checkpoint.names)
    assert checkpoint.nbytes > 50e6
    assert resident_bytes() - before < largest + 24e6
    assert len(list(Path("/proc/self/fd").iterdir())) == num_fds


# -- the digest -------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_content_and_not_of_place_or_files(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    found = {Checkpoint.open(path).digest for path in (_single(tmp_path / "a"), _single(tmp_path / "b"), _sharded(tmp_path / "c"))}
    assert len(found) == 1


def test_swapping_two_tensors_of_a_shape_changes_the_digest(tmp_path: Path) -> None:
    before = Checkpoint.open(_single(tmp_path)).digest
    weights = _weights(CONFIG)
    one, other = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[one], weights[other] = weights[other], weights[one]
    assert Checkpoint.open(_single(tmp_path, weights)).digest != before


@pytest.mark.parametrize("place", [0.3, 0.999999])
def test_one_changed_bit_of_a_weight_changes_the_digest(tmp_path: Path, place: float) -> None:
    before = Checkpoint.open(_single(tmp_path)).digest
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    data[8 + size + int((len(data) - 8 - size) * place)] ^= 1
    file.write_bytes(data)
    assert Checkpoint.open(tmp_path).digest != before


def test_a_changed_configuration_changes_the_digest(tmp_path: Path) -> None:
    before = Checkpoint.open(_single(tmp_path)).digest
    assert Checkpoint.open(_single(tmp_path, rope_theta=5e5)).digest != before


# -- what is wrong with files -----------------------------------------------------------------------------------------


def test_a_path_that_is_nowhere_is_refused() -> None:
    assert "there is no such directory" in _refusal(Path("/nowhere/at all"))


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    assert "give the directory that holds config.json" in _refusal(_single(tmp_path) / "model.safetensors")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert "config.json: is missing" in _refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_malformed_json_is_refused_by_the_name_of_its_file(tmp_path: Path, name: str, text: str) -> None:
    _sharded(tmp_path)
    (tmp_path / name).write_text(text)
    assert name in _refusal(tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    _single(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "config.json: is not UTF-8" in _refusal(tmp_path)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    _single(tmp_path)
    _edit_json(tmp_path / "config.json", lambda config: config.update(architectures=["MambaForCausalLM"]))
    message = _refusal(tmp_path)
    assert "MambaForCausalLM" in message
    assert "Qwen3ForCausalLM" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_checkpoint_with_pickles_only_is_refused_and_nothing_in_it_runs(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    _write(tmp_path / "config.json", CONFIG)
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    message = _refusal(tmp_path)
    assert name in message
    assert "convert it to safetensors" in message
    assert not (tmp_path / "sprung").exists()


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "config.json", CONFIG)
    assert "neither model.safetensors nor" in _refusal(tmp_path)
    (tmp_path / "consolidated.safetensors").touch()
    assert "only consolidated.safetensors" in _refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.05, 0.5, 0.9999])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path, share: float) -> None:
    file = _single(tmp_path) / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * share))
    message = _refusal(tmp_path)
    assert "model.safetensors: is truncated" in message
    assert "download it again" in message


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    (_sharded(tmp_path) / SHARDS[1]).unlink()
    assert f"{SHARDS[1]}: is missing" in _refusal(tmp_path)


def test_an_index_that_puts_a_tensor_in_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    _edit_json(_sharded(tmp_path) / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": SHARDS[0]}))
    message = _refusal(tmp_path)
    assert "model.norm.weight" in message
    assert SHARDS[0] in message


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    _edit_json(_sharded(tmp_path) / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    message = _refusal(tmp_path)
    assert "model.norm.weight" in message
    assert "does not name it" in message


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "x/model.safetensors", "model.bin", 3, None])
def test_an_index_cannot_lead_out_of_its_directory_or_to_a_pickle(tmp_path: Path, shard: Any) -> None:
    _edit_json(_sharded(tmp_path) / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": shard}))
    assert "model.norm.weight" in _refusal(tmp_path)


# -- what is wrong with tensors ---------------------------------------------------------------------------------------


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    weights = _weights(CONFIG)
    for name in [name for name in weights if "layers.1" in name][:5]:
        del weights[name]
    message = _refusal(_single(tmp_path, weights))
    assert "model.layers.1.input_layernorm.weight" in message
    assert "and 2 more are missing" in message


def test_an_unexpected_shape_is_refused_with_both(tmp_path: Path) -> None:
    weights = _weights(CONFIG) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(25, 16)}
    message = _refusal(_single(tmp_path, weights))
    assert "model.safetensors: tensor model.layers.1.mlp.up_proj.weight has shape [25, 16]" in message
    assert "[24, 16]" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_served_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = _weights(CONFIG) | {"model.norm.weight": torch.zeros(16).to(dtype)}
    message = _refusal(_single(tmp_path, weights))
    assert "tensor model.norm.weight is " in message
    assert "unquantized" in message


def test_tensors_that_the_architecture_does_not_have_are_refused(tmp_path: Path) -> None:
    weights = _weights(CONFIG) | {"model.layers.0.self_attn.q_norm.weight": torch.zeros(4)}
    assert "tensor model.layers.0.self_attn.q_norm.weight is not part of a LlamaForCausalLM" in _refusal(_single(tmp_path, weights))


def test_more_layers_than_tensors_are_refused_before_names_are_made_for_them(tmp_path: Path) -> None:
    _edit_json(_single(tmp_path) / "config.json", lambda config: config.update(num_hidden_layers=1 << 24))
    assert "`num_hidden_layers` is 16777216" in _refusal(tmp_path)


@pytest.mark.parametrize("eos", [-1, 64, "2", True, [2, None]])
def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: Path, eos: Any) -> None:
    _write(_single(tmp_path) / "generation_config.json", {"eos_token_id": eos})
    assert "generation_config.json: `eos_token_id`" in _refusal(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("top_p", 0), ("top_p", 1.5), ("temperature", "hot"), ("top_k", 2.5), ("min_p", True)])
def test_a_default_that_cannot_be_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    _write(_single(tmp_path) / "generation_config.json", {name: value})
    assert f"generation_config.json: `{name}` is {value!r}" in _refusal(tmp_path)


# -- what is wrong with headers ---------------------------------------------------------------------------------------

NORM = "model.norm.weight"


def _swap_with_first(header: dict[str, Any]) -> None:
    """Put the norm where another tensor lies."""
    at = next(
        entry["data_offsets"][0] for name, entry in header.items() if name not in ("__metadata__", NORM) and entry["data_offsets"][0] > 64
    )
    header[NORM]["data_offsets"] = [at, at + 32]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_swap_with_first, "overlaps"),
        (lambda header: header.pop(NORM), ""),  # its bytes are nobody's
        (lambda header: header[NORM].update(data_offsets=[0, 30]), "takes 32 bytes"),
        (lambda header: header[NORM].update(data_offsets=[10**15, 10**15 + 32]), "is truncated"),
        (lambda header: header[NORM].update(data_offsets=[32, 0]), "malformed"),
        (lambda header: header[NORM].update(data_offsets=[-32, 0]), "malformed"),
        (lambda header: header[NORM].update(data_offsets=[0]), "malformed"),
        (lambda header: header[NORM].update(shape=[8]), "takes 16 bytes"),
        (lambda header: header[NORM].update(shape=[-16]), "malformed"),
        (lambda header: header[NORM].update(shape=[True, 16]), "malformed"),
        (lambda header: header[NORM].update(shape="16"), "malformed"),
        (lambda header: header[NORM].pop("dtype"), "malformed"),
        (lambda header: header.update({NORM: None}), "malformed"),
        (lambda header: header[NORM].update(dtype="F4"), "tensor model.norm.weight is F4"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], text: str) -> None:
    _edit_header(_single(tmp_path) / "model.safetensors", change)
    message = _refusal(tmp_path)
    assert "model.safetensors" in message
    assert text in message


@pytest.mark.parametrize("header", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: bytes) -> None:
    (_single(tmp_path) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "model.safetensors" in _refusal(tmp_path)


def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    file = _single(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "its header claims 1152921504606846976 bytes" in _refusal(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    file = _single(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    assert "4 bytes follow tensor" in _refusal(tmp_path)


# -- what changes later -----------------------------------------------------------------------------------------------


def test_a_file_that_changed_since_it_was_checked_is_not_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(_single(tmp_path))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(CheckpointError, match="has changed since it was checked"):
        checkpoint.tensor("model.norm.weight")
    file.unlink()
    with pytest.raises(CheckpointError, match="is gone since it was checked"):
        checkpoint.tensor("model.norm.weight")


def test_a_tensor_that_the_model_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor model\.nothing is not one of the model's"):
        Checkpoint.open(_single(tmp_path)).tensor("model.nothing")
