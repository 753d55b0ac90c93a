"""What a worker gets where the configuration says `auto`: threads, arena and slabs from the host and the models."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from polymux.actors.arena import default_slab_bytes
from polymux.actors.engine import EngineSettings
from polymux.actors.worker import WorkerSettings
from polymux.cluster.config import ClusterConfig, PoolConfig
from polymux.cluster.devices import CPU_SEAT, Seat
from polymux.transport.errors import ConfigError
from polymux.transport.kv import KVSettings
from polymux.transport.messages import ModelSpec, Role
from polymux.transport.units import MIB, WorkerId

HOST_SHARE = 0.6  # of the host's memory, for the arenas of all workers together
FULL_LENGTH_SEQS = 8  # sequences of full length that an automatic arena holds of each model
MIN_BLOCKS_PER_SLAB = 4
STORE_SHARE = 0.5  # of the host's memory, for weight images
TIER_SHARE = 0.125  # and for swapped KV; neither is taken before it is used


def worker_settings(
    config: ClusterConfig, role: Role, worker_id: WorkerId, store_address: str, specs: Sequence[ModelSpec], seat: Seat = CPU_SEAT
) -> WorkerSettings:
    """Everything that one worker needs. Raises ConfigError when the models cannot fit the arena that the configuration asks for."""
    pool = config.pools.of(role)
    num_ranks = config.pools.num_ranks
    specs = [spec.on_ranks(pool.tensor_parallel) for spec in specs]
    arena_bytes = pool.arena_bytes or seat.arena_bytes or _auto_arena(config, specs, num_ranks)
    slab_bytes = config.engine.slab_bytes or _auto_slab(arena_bytes, specs)
    reserve = int(arena_bytes * (1 - config.engine.kv_fraction))
    largest = max(specs, key=lambda s: s.weight_bytes, default=None)
    if largest is not None and largest.weight_bytes > reserve:
        raise ConfigError(
            f"pools.{role}.arena_bytes={arena_bytes} keeps {reserve} bytes for weights (1 - engine.kv_fraction) and {largest.model} takes "
            f"{largest.weight_bytes}; raise it to {int(largest.weight_bytes / (1 - config.engine.kv_fraction)) + MIB} or more"
        )
    policies = config.policies
    return WorkerSettings(
        worker_id=worker_id,
        role=role,
        arena_bytes=arena_bytes,
        engine=EngineSettings(
            weight_reserve_bytes=reserve,
            slab_bytes=slab_bytes,
            max_num_seqs=config.engine.max_num_seqs,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            batch_invariant=config.engine.batch_invariant,
            prefix_caching=config.engine.prefix_caching,
            device=seat.device,
        ),
        token=config.security.cluster_token,
        store_address=store_address,
        host=config.transport.listen_host or "127.0.0.1",
        num_threads=num_threads(pool, num_ranks),
        num_ranks=pool.tensor_parallel,
        rank_timeout_s=config.engine.rank_timeout_s,
        prefill_policy=policies.prefill,
        prefill_settings=(("max_group_size", policies.max_group_size),),
        decode_policy=policies.decode,
        decode_settings=(("max_quota_s", policies.max_quota_s),),
        keep_s=config.transport.transfer_timeout_s,
        costs_path=config.costs.path,
        probe_interval_s=config.engine.probe_interval_s,
        kv=KVSettings(backend=config.transport.backend, silence_s=config.transport.transfer_timeout_s),
    )


def num_threads(pool: PoolConfig, num_ranks: int) -> int:
    """Compute threads of one rank: over all ranks no more than the host has cores, for spinning threads slow each other down."""
    return pool.num_threads or max((os.cpu_count() or 1) // num_ranks, 1)


def _auto_arena(config: ClusterConfig, specs: Sequence[ModelSpec], num_ranks: int) -> int:
    """All weights and some full-length sequences of the hungriest model, within this rank's share of the host."""
    weights = sum(spec.weight_bytes for spec in specs)
    kv = max((FULL_LENGTH_SEQS * spec.kv.num_blocks(spec.max_model_len) * spec.kv.block_bytes for spec in specs), default=0)
    wanted = max(weights / (1 - config.engine.kv_fraction), weights + kv, 64 * MIB)
    return min(math.ceil(wanted / MIB), int(host_memory_bytes() * HOST_SHARE / num_ranks) // MIB) * MIB


def _auto_slab(arena_bytes: int, specs: Sequence[ModelSpec]) -> int:
    """The default, or as large as the largest block needs."""
    largest = max((spec.kv.block_bytes for spec in specs), default=0)
    slab = default_slab_bytes(arena_bytes)
    while slab < MIN_BLOCKS_PER_SLAB * largest:
        slab *= 2
    return slab


def store_bytes(budget_bytes: int | None, kv_bytes: int | None) -> tuple[int, int]:
    """A node's memory for weight images and for swapped KV; `auto` goes by the size of the host that this runs on."""
    host_bytes = host_memory_bytes()
    return budget_bytes or int(host_bytes * STORE_SHARE), int(host_bytes * TIER_SHARE) if kv_bytes is None else kv_bytes


def host_memory_bytes() -> int:
    """Memory of this host, or of the control group that confines this process, whichever is less."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).exists() else "max"
        if text.isdigit():
            host = min(host, int(text))
    return host
