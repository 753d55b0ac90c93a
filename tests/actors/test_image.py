"""The weight image: its manifest survives the wire or is refused, its bytes are checked, its tensors are used where they lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from safetensors.torch import load_file, save_file

from polymux.actors.weights.bind import bind_weights
from polymux.actors.weights.builder import build_image
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.actors.weights.image import ALIGNMENT, CHECK_BYTES, CHECKSUM_BYTES, ImageManifest, TensorEntry, checks_of
from polymux.kernels import onednn
from polymux.transport.errors import CheckpointError, ConfigError, WireError

CheckpointOf = Callable[..., Path]
RunnerFor = Callable[..., Any]

packs = pytest.mark.skipif(not onednn.is_available(torch.float32), reason="this CPU has no packed fp32 product")


def manifest_of(path: Path, dtype: str = "float32", layout: str = "auto") -> ImageManifest:
    fd = os.memfd_create("image")
    try:
        manifest = build_image(Checkpoint.open(path), fd, dtype=dtype, layout=layout)
        assert os.fstat(fd).st_size == manifest.nbytes
        return manifest
    finally:
        os.close(fd)


def verify(manifest: ImageManifest, weights: torch.Tensor) -> None:
    for check in checks_of(manifest):
        check(weights)


@pytest.mark.parametrize("layout", ["plain", "auto"])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_entries_are_aligned_disjoint_and_covered_by_the_groups_in_order(name: str, layout: str, checkpoint_of: CheckpointOf) -> None:
    manifest = manifest_of(checkpoint_of(name), layout=layout)
    end = 0
    for entry in sorted({entry.offset: entry for entry in manifest.entries}.values(), key=lambda entry: entry.offset):
        assert entry.offset % ALIGNMENT == 0
        assert entry.offset >= end
        end = entry.offset + entry.nbytes
    config = Checkpoint.open(checkpoint_of(name)).config
    assert len(manifest.groups) == config.num_layers + 2
    assert [sum(group) for group in manifest.groups] == [offset for offset, _ in manifest.groups[1:]] + [manifest.nbytes]
    for layer in range(config.num_layers):
        start, nbytes = manifest.groups[layer + 1]
        assert all(start <= e.offset < start + nbytes for e in manifest.entries if e.name.startswith(f"layers.{layer}."))


def test_a_manifest_survives_the_wire(checkpoint_of: CheckpointOf) -> None:
    manifest = manifest_of(checkpoint_of("llama"))
    assert ImageManifest.from_bytes(manifest.to_bytes()) == manifest


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-tied", "qwen3-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_table_is_stored_once(name: str, dtype: str, checkpoint_of: CheckpointOf) -> None:
    manifest = manifest_of(checkpoint_of(name), dtype)
    entries = {entry.name: entry for entry in manifest.entries}
    assert entries["embedding"].offset == entries["head"].offset
    assert manifest.groups[0][1] < 1.5 * 515 * 64 * (4 if dtype == "float32" else 2)


def test_the_embedding_of_a_packed_head_is_the_table(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    checkpoint = Checkpoint.open(checkpoint_of("qwen2-tied"))
    packed, plain = (runner_for(checkpoint, "bfloat16", layout=layout) for layout in ("auto", "plain"))
    ids = torch.arange(515)
    tables = []
    for runner in (packed, plain):
        weights = bind_weights(checkpoint.config, runner.manifest, runner.weights)
        tables.append(onednn.embed(weights.embedding, ids)[:, :64] if weights.embedding.dim() == 4 else weights.embedding[ids])
    assert torch.equal(*tables)
    assert torch.equal(tables[1], checkpoint.tensor("model.embed_tokens.weight").bfloat16())


@packs
def test_bound_weights_lie_in_the_image(pack_all: None, checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    checkpoint = Checkpoint.open(checkpoint_of("llama"))
    runner = runner_for(checkpoint, "float32")
    weights = bind_weights(checkpoint.config, runner.manifest, runner.weights)
    first, last = runner.weights.data_ptr(), runner.weights.data_ptr() + runner.manifest.nbytes
    for layer in weights.layers:
        for weight in (layer.qkv, layer.output, layer.gate, layer.up, layer.down):
            assert weight.is_mkldnn
            assert first <= torch.ops.mkldnn.data_ptr(weight) < last
        assert first <= layer.input_norm.data_ptr() < last


def test_a_flipped_byte_is_found_and_its_tensor_named(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("qwen3")), "float32")
    weights = runner.weights.clone()
    verify(runner.manifest, weights)
    entry = next(entry for entry in runner.manifest.entries if entry.name == "layers.1.up")
    weights[entry.offset + entry.nbytes // 2] ^= 1
    with pytest.raises(CheckpointError, match=r"layers\.1\.up"):
        verify(runner.manifest, weights)


def test_checks_cover_every_byte_of_every_entry_once(checkpoint_of: CheckpointOf) -> None:
    manifest = manifest_of(checkpoint_of("llama"))
    large = replace(manifest.entries[-1], nbytes=2 * CHECK_BYTES + 5, checksums=bytes(range(3 * CHECKSUM_BYTES)))
    checks = list(checks_of(replace(manifest, entries=(*manifest.entries[:-1], large))))
    assert sum(check.end - check.begin for check in checks) == sum(e.nbytes for e in manifest.entries[:-1]) + large.nbytes
    assert [(c.begin, c.end) for c in checks] == sorted((c.begin, c.end) for c in checks)
    assert [c.checksum for c in checks if c.entry is large] == [bytes(range(at, at + CHECKSUM_BYTES)) for at in (0, 16, 32)]


def test_an_image_has_the_digest_of_its_checkpoint_whatever_its_layout(checkpoint_of: CheckpointOf) -> None:
    path = checkpoint_of("qwen3-tied")
    digest = Checkpoint.open(path).digest
    assert {manifest_of(path, dtype, layout).digest for dtype in ("float32", "bfloat16") for layout in ("plain", "auto")} == {digest}


def test_joined_tensors_of_several_dtypes_are_converted_each(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    path = checkpoint_of("llama")
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    odd = {name: tensor.bfloat16() if "k_proj" in name or "q_proj" in name else tensor.float() for name, tensor in tensors.items()}
    save_file(odd, tmp_path / "model.safetensors")
    fd = os.memfd_create("image")
    manifest = build_image(Checkpoint.open(tmp_path), fd, dtype="float32", layout="plain")
    entry = next(entry for entry in manifest.entries if entry.name == "layers.0.qkv")
    data = torch.frombuffer(bytearray(os.pread(fd, entry.nbytes, entry.offset)), dtype=torch.float32).view(entry.shape)
    os.close(fd)
    assert torch.equal(data, torch.cat([odd[f"model.layers.0.self_attn.{name}_proj.weight"].float() for name in "qkv"]))


def test_a_file_that_shrinks_while_an_image_is_built_is_a_typed_error(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_of("llama"), tmp_path, dirs_exist_ok=True)
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", checkpoint.files[0].nbytes - 100)
    fd = os.memfd_create("image")
    with pytest.raises(CheckpointError, match="has changed since it was checked"):
        build_image(checkpoint, fd, dtype="float32", layout="auto")
    os.close(fd)


def changed(manifest: ImageManifest, **fields: Any) -> bytes:
    return replace(manifest, **fields).to_bytes()


def with_entry(manifest: ImageManifest, **fields: Any) -> bytes:
    first: TensorEntry = replace(manifest.entries[0], **fields)
    return changed(manifest, entries=(first, *manifest.entries[1:]))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda m: m.to_bytes()[:-3], "msgpack"),
        (lambda m: b"\xc1", "msgpack"),
        (lambda m: msgpack.packb({"digest": 1}), "version"),
        (lambda m: msgpack.packb([1, *msgpack.unpackb(m.to_bytes())[1:]]), "version"),
        (lambda m: changed(m, dtype="int8"), "dtype"),
        (lambda m: changed(m, dtype=["float32"]), "dtype"),
        (lambda m: changed(m, layout="zip"), "layout"),
        (lambda m: changed(m, nbytes=-1), "nbytes"),
        (lambda m: changed(m, nbytes=1000), "nbytes|groups"),
        (lambda m: changed(m, digest=7), "digest"),
        (lambda m: changed(m, groups=((0, m.nbytes + 1),)), "groups"),
        (lambda m: with_entry(m, offset=64), "offset"),
        (lambda m: with_entry(m, offset=1 << 40), "nbytes"),
        (lambda m: with_entry(m, shape=(515, 65)), "nbytes"),
        (lambda m: with_entry(m, shape=()), "shape"),
        (lambda m: with_entry(m, shape=(True, 64)), "shape"),
        (lambda m: with_entry(m, checksums="0"), "checksums"),
        (lambda m: with_entry(m, checksums=bytes(15)), "checksums"),
        (lambda m: with_entry(m, metadata=b"?"), "metadata"),
        (lambda m: with_entry(m, name=None), "name"),
    ],
)
def test_a_damaged_manifest_is_refused_by_field(damage: Callable[[ImageManifest], bytes], named: str, checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(WireError, match=named):
        ImageManifest.from_bytes(damage(manifest_of(checkpoint_of("llama"), layout="plain")))


def test_weights_of_another_model_are_not_bound(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("llama")), "float32")
    missing = replace(runner.manifest, entries=tuple(e for e in runner.manifest.entries if e.name != "layers.2.down"))
    with pytest.raises(WireError, match=r"layers\.2\.down"):
        bind_weights(runner.model.config, missing, runner.weights)
    with pytest.raises(WireError, match="cannot hold"):
        bind_weights(runner.model.config, runner.manifest, runner.weights[:-1])
    with pytest.raises(WireError, match="cannot hold"):
        bind_weights(runner.model.config, replace(runner.manifest, nbytes=64), runner.weights[1:])


@packs
def test_a_packed_weight_of_the_wrong_size_is_not_bound(pack_all: None, checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("llama")), "float32")
    entries = {entry.name: entry for entry in runner.manifest.entries}
    wrong = replace(entries["layers.0.down"], metadata=entries["layers.0.up"].metadata, nbytes=entries["layers.0.down"].nbytes + 64)
    manifest = replace(runner.manifest, entries=tuple((entries | {"layers.0.down": wrong}).values()))
    with pytest.raises(WireError, match=r"layers\.0\.down"):
        bind_weights(runner.model.config, manifest, runner.weights)


@pytest.mark.parametrize(("dtype", "layout"), [("int8", "auto"), ("float32", "rows")])
def test_an_unknown_dtype_or_layout_is_a_config_error(dtype: str, layout: str, checkpoint_of: CheckpointOf) -> None:
    with pytest.raises(ConfigError, match=r"int8|rows"):
        manifest_of(checkpoint_of("llama"), dtype, layout)
