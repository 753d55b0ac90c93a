"""The cluster to simulate, from a YAML file: how many devices of what kind, and by which cost model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from polymux.deploy.simulation.kinds import Kind, parse_kind
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

    `kinds` of physical costs may be a mapping too, to what `kinds.py` reads: nothing for a kind that is known, else sizes, seconds and the
    `gpus` of an instance. `hosts` says which links join the devices: settings of `Hosts` (`disagg/sim/topology.py`), over the defaults of
    the kind of device. `hosts: false` goes without: each device, or `devices_per_link` of them in turn, loads over `link_gb_per_s`.
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
    kinds: tuple[str, ...] | Mapping[str, Any] = field(default=DEFAULT_KINDS)

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
        if self.costs == "physical":
            self._physical()
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

    def links(self, gpus: int = 1) -> Hosts | None:
        """With so many neighbours as one device. Raises ConfigError for what is no setting of hosts."""
        if self.costs != "physical" or self.hosts is False:
            return None
        return Hosts.parse({} if self.hosts in (None, True) else self.hosts, self.device).in_groups(gpus)

    def kind_names(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    def gpus_of(self) -> dict[str, int]:
        """Of an instance, by kind."""
        if self.costs != "physical":
            return dict.fromkeys(self.kinds, 1)
        return {name: kind.gpus for name, kind in self._physical().items()}

    def one_size(self) -> int:
        """GPUs of every instance. Raises ConfigError where they differ: one pool has instances that are alike."""
        sizes = sorted(set(self.gpus_of().values()))
        if len(sizes) > 1:
            raise ConfigError(f"kinds take {' or '.join(map(str, sizes))} GPUs each; simulate one size at a time, or plan", param="kinds")
        return sizes[0] if sizes else 1

    def cost_model(self, gpus: int = 1) -> CostModel:
        """Of instances with so many GPUs. Raises ConfigError for a kind that the cost model does not know."""
        if self.costs == "learned":
            return self._learned()
        if self.costs == "physical":
            hosts = self.links(gpus)
            speed = self.link_gb_per_s * 1e9 * gpus if hosts is None else hosts.load_bytes_per_s
            known = physical_costs(self.device, link_bytes_per_s=speed, memory_bytes=round(self.memory_gib * gpus * GIB))
            own = {name: kind.costs for name, kind in self._physical().items() if kind.costs is not None}
            return replace(known, kinds={**known.kinds, **own})
        found: CostModel = H100_ARTIFACT
        if unknown := set(self.kinds) - set(found.kinds):  # type: ignore[attr-defined]
            raise ConfigError(f"kinds {', '.join(sorted(unknown))} have no {self.costs} costs", param="kinds")
        return found

    def _physical(self) -> dict[str, Kind]:
        known = physical_costs(self.device)
        named = self.kinds if isinstance(self.kinds, Mapping) else dict.fromkeys(self.kinds)
        return {name: parse_kind(name, data, known) for name, data in named.items()}

    def pool(self, num_devices: int | None = None, gpus: int = 1) -> Pool:
        """Of so many devices instead of its own, each an instance of so many GPUs."""
        if num_devices is None and (self.devices % gpus or (self.prefill or 0) % gpus):
            raise ConfigError(
                f"devices={self.devices} and prefill={self.prefill} must be multiples of {gpus}, an instance's GPUs", param="devices"
            )
        num_prefill = None if self.prefill is None or num_devices not in (None, self.devices // gpus) else self.prefill // gpus
        return Pool(
            num_devices=num_devices or self.devices // gpus,
            num_prefill=num_prefill,
            max_prefill_tokens=self.max_prefill_tokens,
            max_num_seqs=self.max_num_seqs,
            weight_budget_bytes=None if self.costs == "artifact" else round(self.weight_gib * gpus * GIB),
            devices_per_link=self.devices_per_link,
            hosts=self.links(gpus),
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
