"""The cluster to simulate, from a YAML file: how many devices of what kind, and by which cost model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from polymux.disagg.cost import Fit
from polymux.disagg.sim.costs import H100_ARTIFACT, CostModel
from polymux.disagg.sim.learned import LearnedKind, learned_costs
from polymux.disagg.sim.physical import DEVICES, GIB, physical_costs
from polymux.disagg.sim.policies import Pool
from polymux.disagg.sim.topology import Hosts
from polymux.transport.errors import ConfigError

COSTS = ("physical", "artifact", "learned")
DEFAULT_KINDS = (*("qwen2.5-7b",) * 6, *("yi-9b",) * 2, *("llama2-13b",) * 2)  # the published mix


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """`learned` costs need `saved`, the file under `costs.path`, and `kinds` as a mapping of name to digest, weight_bytes and kv_bytes.

    With physical costs `hosts` says which links join the devices: settings of `Hosts` (`disagg/sim/topology.py`) over the defaults of the
    kind of device. `hosts: false` goes without: each device, or `devices_per_link` of them one after another, loads over `link_gb_per_s`.
    """

    devices: int = 16
    prefill: int | None = None  # devices, under policies that keep the phases apart; default: the published 6 of 16
    costs: str = "physical"
    device: str = "h100"
    hosts: Mapping[str, Any] | bool | None = None
    link_gb_per_s: float = 25.0  # host memory to device
    devices_per_link: int = 1  # that share it
    memory_gib: float = 72.0  # for weights and KV
    weight_gib: float = 48.0  # of it, for weights that stay
    max_prefill_tokens: int = 2048
    max_num_seqs: int = 256
    saved: str | None = None
    kinds: tuple[str, ...] | Mapping[str, Mapping[str, Any]] = field(default=DEFAULT_KINDS)

    def __post_init__(self) -> None:
        if self.costs not in COSTS:
            raise ConfigError(f"costs={self.costs!r} is no cost model; there are {', '.join(COSTS)}", param="costs")
        if self.device not in DEVICES:
            raise ConfigError(f"device={self.device!r} has no coefficients; {', '.join(DEVICES)} have", param="device")
        for name in ("devices", "devices_per_link", "link_gb_per_s", "memory_gib", "weight_gib", "max_prefill_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ConfigError(f"{name}={value!r} must be a number above 0", param=name)
        for name in ("devices", "devices_per_link", "max_prefill_tokens", "max_num_seqs"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a whole number", param=name)
        if self.weight_gib >= self.memory_gib:
            raise ConfigError(f"weight_gib={self.weight_gib} leaves no KV room in memory_gib={self.memory_gib}", param="weight_gib")
        if self.hosts and self.costs != "physical":
            raise ConfigError(f"costs={self.costs!r} know no links; leave `hosts` out, or take physical costs", param="hosts")
        if self.links() is not None:
            for one in fields(self):
                if one.name in ("link_gb_per_s", "devices_per_link") and getattr(self, one.name) != one.default:
                    raise ConfigError(f"{one.name} is for `hosts: false`; with hosts say pcie_gb_per_s and gpus_per_switch", param=one.name)

    @classmethod
    def read(cls, path: Path | None) -> ClusterSpec:
        """Of a YAML file; the defaults without one. Raises ConfigError for what is not a setting."""
        if path is None:
            return cls()
        import yaml

        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", param="cluster") from error
        known = [one.name for one in fields(cls)]
        if not isinstance(data, dict) or (unknown := sorted(map(str, data.keys() - set(known)))):
            raise ConfigError(f"{path} has unknown settings {unknown if isinstance(data, dict) else data!r}; there are {', '.join(known)}")
        if isinstance(data.get("kinds"), list):
            data["kinds"] = tuple(data["kinds"])
        return cls(**data)

    def links(self) -> Hosts | None:
        """Raises ConfigError for what is no setting of hosts."""
        if self.costs != "physical" or self.hosts is False:
            return None
        return Hosts.parse({} if self.hosts in (None, True) else self.hosts, self.device)

    def kind_names(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    def cost_model(self) -> CostModel:
        """Raises ConfigError for a kind that the cost model does not know."""
        if self.costs == "learned":
            return self._learned()
        found: CostModel = H100_ARTIFACT
        if self.costs == "physical":
            hosts = self.links()
            speed = self.link_gb_per_s * 1e9 if hosts is None else hosts.load_bytes_per_s
            found = physical_costs(self.device, link_bytes_per_s=speed, memory_bytes=round(self.memory_gib * GIB))
        if unknown := set(self.kinds) - set(found.kinds):  # type: ignore[attr-defined]
            raise ConfigError(f"kinds {', '.join(sorted(unknown))} have no {self.costs} costs", param="kinds")
        return found

    def pool(self, num_devices: int | None = None) -> Pool:
        """Of so many devices instead of its own."""
        return Pool(
            num_devices=num_devices or self.devices,
            num_prefill=self.prefill if num_devices in (None, self.devices) else None,
            max_prefill_tokens=self.max_prefill_tokens,
            max_num_seqs=self.max_num_seqs,
            weight_budget_bytes=None if self.costs == "artifact" else round(self.weight_gib * GIB),
            devices_per_link=self.devices_per_link,
            hosts=self.links(),
        )

    def to_dict(self) -> dict[str, Any]:
        """`hosts` with their defaults; None without links."""
        hosts = self.links()
        return asdict(self) | {"hosts": None if hosts is None else asdict(hosts)}

    def _learned(self) -> CostModel:
        if self.saved is None or not isinstance(self.kinds, Mapping):
            raise ConfigError("learned costs need `saved` and `kinds` with digest, weight_bytes and kv_bytes of each", param="costs")
        try:
            kinds = {
                name: LearnedKind(digest=one["digest"], num_weight_bytes=int(one["weight_bytes"]), num_kv_bytes=int(one["kv_bytes"]))
                for name, one in self.kinds.items()
            }
            fits = {key: Fit.from_dict(fit) for key, fit in json.loads(Path(self.saved).read_text(encoding="utf-8"))["fits"].items()}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"learned costs cannot be read: {type(error).__name__} {error}", param="saved") from error
        return learned_costs(kinds, fits, memory_bytes=round(self.memory_gib * GIB))
