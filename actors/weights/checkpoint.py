"""A Hugging Face checkpoint: everything about it checked before anything is registered, its tensors read one at a time.

A directory holds config.json and the weights, as model.safetensors or as shards that model.safetensors.index.json names; where it has them,
generation_config.json, tokenizer.json and a chat template. Nothing is ever unpickled. Tensors may be F32, BF16 or F16, and may be mixed:
who builds an image converts them to one dtype.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from polymux.actors.chat_template import load_templates
from polymux.actors.models.config import ArchConfig
from polymux.actors.weights.generation import eos_token_ids, generation_defaults
from polymux.actors.weights.hub import resolve
from polymux.actors.weights.json_file import parse_object, read_object, read_text
from polymux.actors.weights.safetensors_file import TORCH_DTYPES, SafetensorsFile, StoredTensor
from polymux.transport.errors import CheckpointError
from polymux.transport.units import MIB

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NOT_WEIGHTS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # buffers that old exports kept
PIECE_BYTES = 4 * MIB  # of a tensor: read by one thread; the digest depends on it
DIGEST_VERSION = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint that was found whole. It holds no file open and no weight in memory.

    `names` are the tensors that the model needs, in the order in which its layers run. `dtype` is what config.json declares, else that of
    most bytes. `generation_defaults` has those of temperature, top_p, top_k, min_p and repetition_penalty that generation_config.json sets.
    """

    path: Path
    config_json: str
    config: ArchConfig
    eos_token_ids: tuple[int, ...]
    generation_defaults: Mapping[str, float | int]
    files: tuple[SafetensorsFile, ...]
    tensors: Mapping[str, tuple[SafetensorsFile, StoredTensor]]
    has_tokenizer: bool
    has_chat_template: bool

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a directory, or a hub id ("org/name", "org/name@revision").

        Raises CheckpointError naming the file, the tensor where there is one, and the fix; ConfigError for a hub id where huggingface_hub
        is not installed.
        """
        path = resolve(source)
        if not path.is_dir():
            raise CheckpointError(f"{path}: is a file; give the directory that holds config.json")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path / 'config.json'}: is missing; give the directory of a Hugging Face checkpoint")
        config_json = read_text(path / "config.json")
        values = parse_object(path / "config.json", config_json)
        config = ArchConfig.from_json(config_json, str(path / "config.json"))
        files, found = _open_weights(path)
        generation = read_object(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
        return cls(
            path=path,
            config_json=config_json,
            config=config,
            eos_token_ids=eos_token_ids(path, generation, values, config.vocab_size),
            generation_defaults=generation_defaults(path, generation),
            files=files,
            tensors=_select(path, config, found),
            has_tokenizer=(path / "tokenizer.json").is_file(),
            has_chat_template=bool(load_templates(path)),
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def nbytes(self) -> int:
        """Of the tensors in `names`, as they are stored."""
        return sum(stored.nbytes for _, stored in self.tensors.values())

    @property
    def dtype(self) -> str:
        if self.config.dtype is not None:
            return self.config.dtype
        sizes: Counter[str] = Counter()
        for _, stored in self.tensors.values():
            sizes[stored.dtype] += stored.nbytes
        return str(TORCH_DTYPES[max(sorted(sizes), key=lambda dtype: sizes[dtype])]).removeprefix("torch.")

    def tensor(self, name: str) -> Tensor:
        """One tensor, as stored, in memory of its own. Raises CheckpointError for a name not in `names`, or a file that has changed."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is not one of the model's; `names` has those")
        return self.tensors[name][0].read(name)

    def pieces(self, name: str) -> range:
        """Where the tensor's pieces begin; each has `PIECE_BYTES`, the last what is left."""
        return range(0, self.tensors[name][1].nbytes, PIECE_BYTES)

    def read_piece(self, name: str, begin: int, into: memoryview) -> bytes:
        """Fill `into` with the tensor's bytes from `begin`: their BLAKE3. From any thread. Raises CheckpointError for a changed file."""
        file, stored = self.tensors[name]
        return file.read_into(stored.offset + begin, into)

    def digest_of(self, pieces: Mapping[str, Sequence[bytes]]) -> str:
        """The checkpoint's digest, from the BLAKE3 of each piece of each tensor.

        Images of one digest are taken for each other: by workers that load them, by nodes that must hold the same, and by the prefix cache,
        which gives one model's KV to another. The author of a checkpoint is not whom the operator trusts with that, so the hash must resist
        collisions made on purpose, which sums and CRCs do not. It covers config.json and what the model reads, not how that lies in files.
        """
        tensors = [
            [name, stored.dtype, stored.shape, blake3(b"".join(pieces[name])).hexdigest()] for name, (_, stored) in self.tensors.items()
        ]
        return blake3(json.dumps([DIGEST_VERSION, self.config_json, tensors]).encode()).hexdigest()

    @cached_property
    def digest(self) -> str:
        """`digest_of` every byte, read for nothing else. Who builds an image gets it on the way."""

        def hashed(name: str, begin: int) -> bytes:
            left = self.tensors[name][1].nbytes - begin
            return self.read_piece(name, begin, memoryview(bytearray(min(left, PIECE_BYTES))))

        with ThreadPoolExecutor(num_readers()) as pool:
            found = {name: [pool.submit(hashed, name, begin) for begin in self.pieces(name)] for name in self.names}
            return self.digest_of({name: [piece.result() for piece in pieces] for name, pieces in found.items()})


def num_readers() -> int:
    """Threads that read, hash and write weights: the cores that this process may use, of which eight outrun any disk."""
    return min(8, len(os.sched_getaffinity(0)))


Found = dict[str, tuple[SafetensorsFile, StoredTensor]]


def _open_weights(path: Path) -> tuple[tuple[SafetensorsFile, ...], Found]:
    """Every tensor in the weight files, with its file. A single file wins over an index, as in transformers."""
    if (path / SINGLE).is_file():
        file = SafetensorsFile.open(path / SINGLE)
        return (file,), {name: (file, stored) for name, stored in file.tensors.items()}
    if not (path / INDEX).is_file():
        raise _no_weights(path)
    weight_map = _read_index(path / INDEX)
    shards = {name: _open_shard(path, name) for name in sorted(set(weight_map.values()))}
    found: Found = {}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard].tensors:
            raise CheckpointError(f"{path / INDEX}: puts tensor {tensor} in {shard}, which does not have it; download the checkpoint again")
        found[tensor] = shards[shard], shards[shard].tensors[tensor]
    for shard, file in shards.items():
        for tensor in file.tensors:
            if weight_map.get(tensor) != shard and not NOT_WEIGHTS.search(tensor):
                elsewhere = f"says it is in {weight_map[tensor]}" if tensor in weight_map else "does not name it"
                raise CheckpointError(f"{path / shard}: has tensor {tensor}, and {INDEX} {elsewhere}; download the checkpoint again")
    return tuple(shards.values()), found


def _open_shard(path: Path, name: str) -> SafetensorsFile:
    if not (path / name).is_file():
        raise CheckpointError(f"{path / name}: is missing, and {INDEX} names it; download the checkpoint again")
    return SafetensorsFile.open(path / name)


def _read_index(path: Path) -> dict[str, str]:
    weight_map: Any = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: `weight_map` is missing or is no object; download it again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: puts tensor {tensor} in {shard!r}, which does not name a safetensors file beside it; download it again"
            )
    return weight_map


def _no_weights(path: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    others = sorted(file.name for pattern in ("*.safetensors", "*.gguf") for file in path.glob(pattern))
    wanted = f"{path}: has neither {SINGLE} nor {INDEX}"
    if others:
        return CheckpointError(f"{wanted}, only {', '.join(others[:3])}; export it with transformers' save_pretrained")
    if pickles:
        return CheckpointError(
            f"{wanted}, only pickles ({', '.join(pickles[:3])}), which could run any code and are never loaded; convert it to safetensors: "
            "load it with transformers where you trust it, and save_pretrained"
        )
    return CheckpointError(f"{wanted}; download the checkpoint again, with its *.safetensors")


def _select(path: Path, config: ArchConfig, found: Found) -> Found:
    """The tensors that the model needs, in its order, each of the right shape and dtype; others must be known to be superfluous."""
    if config.num_layers > len(found):  # before a name is made for each layer of a damaged number of them
        raise CheckpointError(
            f"{path / 'config.json'}: `num_hidden_layers` is {config.num_layers} and the weight files have {len(found)} tensors in all; "
            "download the checkpoint again"
        )
    expected = config.expected_tensors()
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{path}: {_listed(missing)} missing from the weight files; download the checkpoint again, or give it its own config.json"
        )
    extra = [name for name in found if name not in expected and not NOT_WEIGHTS.search(name) and name != "lm_head.weight"]
    if extra:
        raise CheckpointError(
            f"{path}: {_listed(extra)} not part of a {config.architecture} of this config.json, and serving without would drop weights; "
            "give the checkpoint its own config.json"
        )
    for name, shape in expected.items():
        file, stored = found[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(stored.shape)} and config.json makes it {list(shape)}; config.json belongs to "
                "another model, or the file does: download both again"
            )
        if stored.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{file.path}: tensor {name} is {stored.dtype}, not {', '.join(TORCH_DTYPES)}; serve the unquantized checkpoint"
            )
    return {name: found[name] for name in expected}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"
