"""The policies that can be simulated, by name, each over the same requests, costs and number of devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polymux.disagg.prefill import prefill_policy
from polymux.disagg.sim.costs import CostModel
from polymux.disagg.sim.loop import Journal, Simulation
from polymux.disagg.sim.oracle import OracleLevel
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.overheads import Overheads
from polymux.disagg.sim.published import Published
from polymux.disagg.sim.request_level import RequestLevel
from polymux.disagg.sim.split import SplitLevel
from polymux.disagg.sim.static import StaticPlacement
from polymux.disagg.sim.token_level import NO_OVERHEADS, TokenLevel
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.turn_policies import turn_policy
from polymux.transport.errors import ConfigError

PREFILL_SHARE = 6 / 16  # of the devices, in Aegaeon's published setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal devices. `num_prefill` of them prefill under policies that keep the phases apart; None takes the published share.

    `weight_budget_bytes`: of a device's memory, where models may stay; None: only the active one does, as in the published artifact.
    """

    num_devices: int
    num_prefill: int | None = None
    max_prefill_tokens: int = 2048
    max_num_seqs: int = 256
    weight_budget_bytes: int | None = None
    devices_per_link: int = 1  # that load weights one after another; only under policies that let weights stay
    hosts: Hosts | None = None  # whose links all copies go over, instead of that
    max_quota_s: float = 4.0  # of a turn, under `slack` and `wrr-shared`
    overheads: Overheads = NO_OVERHEADS  # under the same two

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ConfigError(f"devices={self.num_devices} must be at least 1", param="devices")
        if self.num_prefill is not None and not 0 < self.num_prefill < self.num_devices:
            raise ConfigError(f"prefill={self.num_prefill} must leave some of {self.num_devices} devices for decode", param="prefill")

    @property
    def split(self) -> tuple[int, int]:
        num_prefill = max(1, round(PREFILL_SHARE * self.num_devices)) if self.num_prefill is None else self.num_prefill
        return num_prefill, max(1, self.num_devices - num_prefill)


Builder = Callable[[CostModel, Targets, Pool, Journal | None], Simulation[Any]]


def _turns(name: str) -> Builder:
    def build(costs: CostModel, targets: Targets, pool: Pool, journal: Journal | None) -> Simulation[Any]:
        return TokenLevel(
            costs,
            targets,
            turn_policy(name, max_quota_s=pool.max_quota_s),
            **_shared_settings(pool),
            journal=journal,
        )

    return build


def _shared_settings(pool: Pool) -> dict[str, Any]:
    """Of every simulation whose workers are as live ones."""
    return {
        "num_workers": pool.num_devices,
        "max_prefill_tokens": pool.max_prefill_tokens,
        "max_num_seqs": pool.max_num_seqs,
        "weight_budget_bytes": pool.weight_budget_bytes,
        "devices_per_link": pool.devices_per_link,
        "hosts": pool.hosts,
        "max_quota_s": pool.max_quota_s,
        "overheads": pool.overheads,
    }


def _published(costs: CostModel, targets: Targets, pool: Pool, journal: Journal | None) -> Simulation[Any]:
    num_prefill, num_decode = pool.split
    return Published(costs, targets, num_prefill=num_prefill, num_decode=num_decode, hosts=pool.hosts, journal=journal)


def _split(costs: CostModel, targets: Targets, pool: Pool, journal: Journal | None) -> Simulation[Any]:
    if pool.num_devices < 2:
        raise ConfigError("slack-split needs two devices, one for each phase", param="devices")
    return SplitLevel(
        costs,
        targets,
        turn_policy("slack", max_quota_s=pool.max_quota_s),
        num_prefill=pool.split[0],
        prefill=prefill_policy("deadline"),
        **_shared_settings(pool),
        journal=journal,
    )


POLICIES: dict[str, Builder] = {
    "slack": _turns("slack"),
    "wrr": _published,
    "wrr-shared": _turns("wrr"),
    "sllm": lambda costs, targets, pool, journal: RequestLevel(
        costs, targets, num_workers=pool.num_devices, hosts=pool.hosts, journal=journal
    ),
    "sllm-idle": lambda costs, targets, pool, journal: RequestLevel(
        costs, targets, num_workers=pool.num_devices, idle_first=True, hosts=pool.hosts, journal=journal
    ),
    "sllm-oracle": lambda costs, targets, pool, journal: OracleLevel(
        costs, targets, num_workers=pool.num_devices, hosts=pool.hosts, journal=journal
    ),
    "static": lambda costs, targets, pool, journal: StaticPlacement(
        costs, targets, num_workers=pool.num_devices, max_models=1, hosts=pool.hosts, journal=journal
    ),
    "mux": lambda costs, targets, pool, journal: StaticPlacement(
        costs, targets, num_workers=pool.num_devices, hosts=pool.hosts, journal=journal
    ),
    "slack-split": _split,
}

ORACLES = frozenset({"sllm-oracle"})  # see output lengths

LABELS = {
    "slack": "slack (polymux)",
    "slack-split": "slack, phases apart",
    "wrr": "wrr (Aegaeon as published)",
    "wrr-shared": "wrr on shared workers",
    "sllm": "ServerlessLLM",
    "sllm-idle": "ServerlessLLM, idle first",
    "sllm-oracle": "ServerlessLLM+ (oracle)",
    "static": "one device a model",
    "mux": "static sharing by memory",
}


def simulation(name: str, costs: CostModel, targets: Targets, pool: Pool, journal: Journal | None = None) -> Simulation[Any]:
    """The policy of that name over this pool, idle. Raises ConfigError, naming the ones there are."""
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} is unknown; there are: {', '.join(POLICIES)}", param="policy")
    return POLICIES[name](costs, targets, pool, journal)
