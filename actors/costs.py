"""What a worker has learned of its costs: predictions for the policies, errors for the metrics, and a file that outlives the worker.

One file for each kind of device, shared by its workers: each replaces it whole, with what it has observed itself and what others had saved.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from polymux.disagg.cost import Fit, Roofline, Vector, guess_decode, guess_prefill, guess_swap, guess_switch
from polymux.transport.errors import ConfigError
from polymux.transport.messages import ModelSpec
from polymux.transport.telemetry import Telemetry
from polymux.transport.units import ModelName

log = logging.getLogger("polymux.costs")

EAGER_OBSERVATIONS = 64  # of one cost; after them every `SPARSE`-th step is enough to follow it
SPARSE = 8
VERSION = 1
MAX_BYTES = 16 << 20  # of a file that is read
MAX_FITS = 4096  # of others that are kept, those that were observed most


class Cost:
    """One fit, observed often while it is young and sparsely later: an observation costs about as much as a layer of a small model."""

    def __init__(self, kind: str, guess: Fit, telemetry: Telemetry) -> None:
        self.fit = guess
        self.is_observed = False  # here, since the start
        self._kind = kind
        self._telemetry = telemetry
        self._num_seen = 0

    def observe(self, features: Vector, seconds: float) -> None:
        predicted_s = self.fit.predict(features)
        self._telemetry.add("cost_predicted_seconds", predicted_s, self._kind)
        self._telemetry.add("cost_actual_seconds", seconds, self._kind)
        self._telemetry.observe("cost_error_ratio", abs(seconds - predicted_s) / max(seconds, 1e-9), self._kind)
        self._num_seen += 1
        if self.fit.num_observed < EAGER_OBSERVATIONS or self._num_seen % SPARSE == 0:
            self.fit = self.fit.observe(features, seconds)
            self.is_observed = True


class Costs:
    """Of one worker. Written by its engine thread, read by the reporting one. `saved` are fits by key, as `observed` gives them."""

    def __init__(self, telemetry: Telemetry, device: Roofline | None = None, saved: Mapping[str, Fit] | None = None) -> None:
        self._telemetry = telemetry
        self._device = device or Roofline()
        self._saved = dict(saved or {})
        self._by_key: dict[str, list[Cost]] = {}
        self._digests: dict[ModelName, str] = {}
        self._lock = threading.Lock()
        self.prefill: dict[ModelName, Cost] = {}
        self.decode: dict[ModelName, Cost] = {}
        self.switch = self._cost("switch", "", guess_switch(self._device))
        self.swap = self._cost("swap", "", guess_swap(self._device))

    def add_model(self, spec: ModelSpec) -> None:
        """Models of one digest share a place in the file: there the one that was observed most counts. One added again stays as it is."""
        if self._digests.get(spec.model) == spec.digest:
            return
        self._digests[spec.model] = spec.digest
        self.prefill[spec.model] = self._cost("prefill", spec.digest, guess_prefill(spec, self._device))
        self.decode[spec.model] = self._cost("decode", spec.digest, guess_decode(spec, self._device))

    def observed(self) -> dict[str, Fit]:
        """What was learned here, by key."""
        with self._lock:
            fits = {key: [cost.fit for cost in costs if cost.is_observed] for key, costs in self._by_key.items()}
        return {key: max(found, key=lambda fit: fit.num_observed) for key, found in fits.items() if found}

    def _cost(self, kind: str, digest: str, guess: Fit) -> Cost:
        key = f"{kind}/{digest}" if digest else kind
        found = self._saved.get(key)
        fits = found is not None and found.anchors == guess.anchors
        cost = Cost(kind, found if found is not None and fits else guess, self._telemetry)
        with self._lock:
            self._by_key.setdefault(key, []).append(cost)
        return cost


class CostFile:
    """The saved costs of one kind of device, in a folder."""

    def __init__(self, folder: str, device: str) -> None:
        self.path = Path(folder) / f"{device}.json"

    def load(self) -> dict[str, Fit]:
        """Empty where there is no file, or a damaged one, which is said in the log: costs are then learned again."""
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ConfigError(f"has more than {MAX_BYTES} bytes")
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("fits"), dict):
                raise ConfigError(f"is no file of costs of version {VERSION}")
            return {str(key): Fit.from_dict(fit) for key, fit in data["fits"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, ConfigError) as error:
            log.warning("costs.not_loaded path=%s reason=%s", self.path, error)
            return {}

    def save(self, observed: Mapping[str, Fit]) -> None:
        """Replace the file, atomically. What cannot be written is said in the log, and lost."""
        if not observed:
            return
        others = sorted(self.load().items(), key=lambda item: (-item[1].num_observed, item[0]))
        fits = dict(others[:MAX_FITS]) | dict(observed)
        text = json.dumps({"version": VERSION, "fits": {key: fits[key].to_dict() for key in sorted(fits)}})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".tmp", dir=self.path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            log.warning("costs.not_saved path=%s reason=%s", self.path, error)


def device_kind(num_threads: int, num_ranks: int = 1, *, gpu: str = "") -> str:
    """A file name for what a worker computes on, a CPU unless a GPU is named: costs learned on one are right on another of this kind."""
    ranks = f"-{num_ranks}-ranks" if num_ranks > 1 else ""
    if gpu:
        return f"gpu-{_slug(gpu)}{ranks}"
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found.group(1) if found else name
    except OSError:
        pass
    return f"cpu-{_slug(name)}-{num_threads}-threads{ranks}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
