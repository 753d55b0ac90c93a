"""A worker's engine on one GPU: decode steps, prompts and switches of Qwen2.5-shaped models, and three of 7B that take turns.

Weights are random. A decode step's floor is the bytes that it must read (weights, but for a table that is only looked up in, and KV)
over the copy bandwidth.
Steps run ahead as a worker's do, and are timed by the host's clock over many of them. The host link's rate is that of one pinned copy.
"""

from __future__ import annotations

import gc
import itertools
import json
import mmap
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gpu.harness import Target, attempt, copy_bytes_per_s, host_to_device_bytes_per_s, matrix_flops_per_s, note

if TYPE_CHECKING:
    from polymux.actors.engine import Engine
    from polymux.actors.weights.image import ImageManifest
    from polymux.transport.messages import ModelSpec
    from polymux.transport.weights import OpenImage

BUDGET_S = 110.0
CONTEXT = 1024
PROMPT = 2048
NUM_STEPS = 48
BATCHES = (1, 32)
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}
TARGETS = (
    *(
        Target(
            name=f"decode.{shape}.batch_{batch}", claim=f"{shape}, {batch} at {CONTEXT} tokens: share of the roofline floor", at_least=0.8
        )
        for shape in SHAPES
        for batch in BATCHES
    ),
    *(
        Target(
            name=f"prefill.{shape}", claim=f"{shape}, {PROMPT} tokens: share of the matrix rate", at_least=0.5 if shape == "7b" else None
        )
        for shape in SHAPES
    ),
    Target(name="switch.share_of_host_link", claim="7b, 15 GB: from the order until a prompt is computed", at_least=0.85),
    Target(name="switch.seconds", claim="the same", unit="s"),
    Target(name="switch.first_s", claim="the first time, its image pinned on the way", unit="s"),
    Target(name="multiplexed.share", claim="three 7b in room for two, 64 steps of 8 a turn: tokens of one that keeps its place"),
)


@dataclass(frozen=True)
class Images:
    """Weights of one shape, the same bytes for every model of it."""

    fd: int
    manifest: ImageManifest

    def spec(self, name: str) -> ModelSpec:
        from polymux.actors.models.config import ArchConfig
        from polymux.transport.messages import ModelSpec
        from polymux.transport.units import ModelName

        config = ArchConfig.from_json(self.manifest.config_json, "the benchmark")
        return ModelSpec(
            model=ModelName(name),
            path="",
            digest=name,
            config_json=self.manifest.config_json,
            dtype="bfloat16",
            kv=config.kv_layout("bfloat16"),
            weight_bytes=self.manifest.nbytes,
            vocab_size=config.vocab_size,
            max_model_len=config.max_position_embeddings,
            eos_token_ids=(),
        )

    def fetch(self, model: str) -> OpenImage:
        from polymux.transport.weights import OpenImage

        manifest = replace(self.manifest, digest=model)
        return OpenImage(manifest.to_bytes(), os.dup(self.fd), manifest.nbytes)

    @property
    def step_bytes(self) -> int:
        """Of weights, that a decode step reads: an embedding of its own is only looked up in."""
        tables = [e.nbytes for e in self.manifest.entries if e.name == "embedding"]
        is_tied = len({e.offset for e in self.manifest.entries}) < len(self.manifest.entries)
        return self.manifest.nbytes - (0 if is_tied else sum(tables))


def make_images(shape: str) -> Images:
    """Random weights in shared memory, sealed as a store's are."""
    from polymux.actors.models.config import ArchConfig
    from polymux.actors.weights.image import ALIGNMENT, CHECK_BYTES, CHECKSUM_BYTES, ImageManifest, TensorEntry
    from polymux.actors.weights.parts import EMBEDDING, HEAD, parts_of
    from polymux.transport.image_maps import seal

    config_json = json.dumps(
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"}
        | {"max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
        | SHAPES[shape]
    )
    config = ArchConfig.from_json(config_json, "the benchmark")
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    qkv, attended = (config.num_heads + 2 * config.num_kv_heads) * head, config.num_heads * head
    sizes = {
        "input_norm": (hidden,),
        "post_norm": (hidden,),
        "final_norm": (hidden,),
        "qkv": (qkv, hidden),
        "qkv_bias": (qkv,),
        "output": (hidden, attended),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        EMBEDDING: (config.vocab_size, hidden),
        HEAD: (config.vocab_size, hidden),
    }
    entries, groups, end = [], [], 0
    for group in parts_of(config):
        start = end
        for part in group:
            size = sizes[part.name.rpartition(".")[2]]
            nbytes = 2 * torch.Size(size).numel()
            entry = TensorEntry(
                name=part.name,
                dtype="bfloat16",
                shape=size,
                layout="plain",
                offset=end,
                nbytes=nbytes,
                checksums=bytes(-(-nbytes // CHECK_BYTES) * CHECKSUM_BYTES),
            )
            entries.append(entry)
            if part.name == HEAD and config.tie_word_embeddings:
                entries.append(replace(entry, name=EMBEDDING))
            end = -(-(end + nbytes) // ALIGNMENT) * ALIGNMENT
        groups.append((start, end - start))
    fd = os.memfd_create(f"polymux-{shape}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, end)
    _fill(fd, end)
    seal(fd)
    manifest = ImageManifest(
        digest=shape,
        config_json=config_json,
        dtype="bfloat16",
        layout="plain",
        nbytes=end,
        entries=tuple(entries),
        groups=tuple(groups),
    )
    return Images(fd, manifest)


def _fill(fd: int, nbytes: int) -> None:
    """With a run of random numbers over and over."""
    some = torch.randn(32 << 20, device="cuda").mul_(0.02).bfloat16().cpu().view(torch.uint8)
    with mmap.mmap(fd, nbytes) as view:
        target = torch.frombuffer(view, dtype=torch.uint8)
        for start in range(0, nbytes, some.nbytes):
            size = min(some.nbytes, nbytes - start)
            target[start : start + size] = some[:size]
        del target


def engine_of(images: Images, names: tuple[str, ...], num_slots: int, kv_bytes: int = 6 << 30) -> Engine:
    from polymux.actors.engine import Engine, EngineSettings
    from polymux.actors.gpu.device import CudaDevice

    device = CudaDevice()
    reserve = num_slots * (images.manifest.nbytes + 256)
    settings = EngineSettings(weight_reserve_bytes=reserve, device="cuda", max_num_seqs=32, max_num_batched_tokens=PROMPT)
    engine = Engine(device.create(reserve + kv_bytes), settings, images, device=device)  # type: ignore[arg-type]
    device.enter()
    for name in names:
        engine.add_model(images.spec(name))
        _trust(engine, images, name)
    return engine


def _trust(engine: Engine, images: Images, name: str) -> None:
    """The image's checksums were compared before: what is measured is the copy."""
    with images.fetch(name) as opened:
        found = engine.residency.loader.maps.open(opened.fd, time.monotonic())
        assert found is not None
        engine.residency.loader.maps.mark_verified(found[0], opened.manifest)


class Batch:
    """Sequences of `CONTEXT` tokens, whatever is in their blocks; each step is handed over before the last one's tokens are read."""

    def __init__(self, engine: Engine, name: str, size: int) -> None:
        from polymux.actors.sampler import SamplerState
        from polymux.transport.messages import SamplingParams
        from polymux.transport.units import ModelName

        self._engine, self._name = engine, ModelName(name)
        spec = engine.spec(self._name)
        params = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)
        self._states = [SamplerState(params, [1], [], (), spec.vocab_size) for _ in range(size)]
        num_blocks = spec.kv.num_blocks(CONTEXT + 4 * NUM_STEPS + 80)
        self._blocks = [engine.pool(self._name).allocate(num_blocks) for _ in range(size)]
        self._length = CONTEXT
        for block_ids in self._blocks:
            engine.pool(self._name).kv[block_ids] = 0

    def run(self, num_steps: int) -> float:
        """Seconds of so many steps, from the first one's order to the last one's tokens."""
        from polymux.actors.drawn import Ask
        from polymux.actors.model_runner import Carried, ForwardBatch, SequenceSlice

        engine, rows = self._engine, range(len(self._blocks))
        asks = [[Ask(state, ahead) for state in self._states] for ahead in (0, 1)]
        before, began_s = None, time.perf_counter()
        for step in range(num_steps):
            slices = tuple(
                SequenceSlice(start=row, num_tokens=1, context_len=self._length + step, block_ids=self._blocks[row]) for row in rows
            )
            carried = Carried(ids=before.ids, rows=tuple(rows)) if before is not None and before.ids is not None else None
            tokens = torch.ones(len(rows), dtype=torch.int64)
            batch = ForwardBatch(token_ids=tokens, slices=slices, logits_rows=None, carried=carried)
            drawn = engine.decode(batch, asks[before is not None])
            if before is not None:
                before.tokens()
            before = drawn
        if before is not None:
            before.tokens()
        return time.perf_counter() - began_s

    def close(self) -> None:
        for block_ids in self._blocks:
            self._engine.pool(self._name).free(block_ids)


def decode_shares(engine: Engine, images: Images, shape: str) -> dict[str, float]:
    found = {}
    for size in BATCHES:
        batch = Batch(engine, shape, size)
        batch.run(8)
        step_s = min(batch.run(NUM_STEPS) for _ in range(3)) / NUM_STEPS
        kv = engine.spec(images.spec(shape).model).kv
        kv_bytes = size * kv.block_bytes * (CONTEXT + NUM_STEPS / 2) / kv.block_size
        floor_s = (images.step_bytes + kv_bytes) / copy_bytes_per_s()
        found[f"decode.{shape}.batch_{size}"] = floor_s / step_s
        found[f"decode.{shape}.batch_{size}.step_ms"] = step_s * 1e3
        batch.close()
    return found


def prefill(engine: Engine, name: str) -> None:
    from polymux.actors.model_runner import ForwardBatch, SequenceSlice
    from polymux.transport.units import ModelName

    pool = engine.pool(ModelName(name))
    blocks = pool.allocate(PROMPT // 16)
    part = SequenceSlice(start=0, num_tokens=PROMPT, context_len=0, block_ids=blocks)
    tokens = torch.randint(0, 1000, (PROMPT,))
    engine.forward(ForwardBatch(token_ids=tokens, slices=(part,), logits_rows=torch.tensor([PROMPT - 1])))
    engine.device.mark().wait()
    pool.free(blocks)


def prefill_share(engine: Engine, shape: str) -> float:
    values = SHAPES[shape]
    hidden, inner, heads = values["hidden_size"], values["intermediate_size"], values["num_attention_heads"]
    head = hidden // heads
    qkv = (heads + 2 * values["num_key_value_heads"]) * head
    layer = 2 * PROMPT * hidden * (qkv + hidden + 3 * inner) + 2 * PROMPT * PROMPT * heads * head  # causal: half of 4 T^2
    seconds = []
    for _ in range(5):
        began_s = time.perf_counter()
        prefill(engine, shape)
        seconds.append(time.perf_counter() - began_s)
    return values["num_hidden_layers"] * layer / min(seconds[1:]) / matrix_flops_per_s()


def switches(engine: Engine, images: Images, name: str) -> dict[str, float]:
    """Loads of a model that is not there, with a prompt behind each."""
    from polymux.transport.units import ModelName

    seconds = []
    for _ in range(4):
        if engine.residency.active is not None:
            engine.residency.evict(engine.residency.active)
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        engine.activate(ModelName(name))
        prefill(engine, name)
        seconds.append(time.perf_counter() - began_s)
    share = images.manifest.nbytes / min(seconds[1:]) / host_to_device_bytes_per_s()
    return {"switch.first_s": seconds[0], "switch.seconds": min(seconds[1:]), "switch.share_of_host_link": share}


def multiplexed(images: Images) -> float:
    """Tokens a second of three models that take turns, each loaded while another steps, over those of one that stays."""
    from polymux.transport.units import ModelName

    names = ("7b", "7b-b", "7b-c")
    engine = engine_of(images, names, 2)
    steps = 64
    engine.activate(ModelName("7b"))
    batch = Batch(engine, "7b", 8)
    batch.run(8)
    alone_s = batch.run(steps)
    batch.close()
    began_s = 0.0
    num_turns = 9
    for turn, name in zip(range(num_turns + 3), itertools.cycle(names), strict=False):
        if turn == 3:
            began_s = time.perf_counter()
        engine.activate(ModelName(name))
        batch = Batch(engine, name, 8)
        engine.prefetch(ModelName(names[(turn + 1) % 3]))
        batch.run(steps)
        batch.close()
    seconds = (time.perf_counter() - began_s) / num_turns
    engine.close()
    return alone_s / seconds


def measure(budget_s: float) -> dict[str, float]:
    from gpu.hash_stand_in import install

    install()
    begin_by_s = time.monotonic() + 0.7 * budget_s
    found: dict[str, float] = {}
    copy_bytes_per_s(), matrix_flops_per_s(), host_to_device_bytes_per_s()  # before the arena takes the memory
    torch.cuda.empty_cache()
    for shape in SHAPES:
        images = make_images(shape)
        found |= attempt(shape, partial(of_shape, images, shape))
        gc.collect()  # what still sees the arena keeps it
        if shape == "7b":
            if time.monotonic() < begin_by_s:
                found |= attempt("multiplexed", lambda images=images: {"multiplexed.share": multiplexed(images)})  # type: ignore[misc]
            else:
                note("engine: no time was left for three models that take turns")
        os.close(images.fd)
    return found


def of_shape(images: Images, shape: str) -> dict[str, float]:
    """One model that is alone."""
    engine, found = engine_of(images, (shape,), 1), dict[str, float]()
    if shape == "7b":
        found |= attempt("switch", partial(switches, engine, images, shape))
    else:
        engine.activate(images.spec(shape).model)
    found |= attempt(f"decode.{shape}", partial(decode_shares, engine, images, shape))
    found |= attempt(f"prefill.{shape}", lambda: {f"prefill.{shape}": prefill_share(engine, shape)})
    engine.close()
    return found
