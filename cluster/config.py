"""One typed configuration of a cluster: from YAML, from plain data, from flags. Frozen; unknown keys are errors.

Precedence: flags, then environment (`environment.py`), then file, then the defaults here. Nothing else reads the environment.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, model_validator

from polymux.cluster.environment import settings
from polymux.cluster.quantities import AutoBytes, AutoCount, AutoNumber, AutoSize, Bytes, Seconds
from polymux.cluster.validation import Section, validated
from polymux.disagg.multiplex import TurnPolicy
from polymux.disagg.prefill import PrefillPolicy, prefill_policy
from polymux.disagg.slo import CLASSES
from polymux.disagg.turn_policies import turn_policy
from polymux.transport.errors import ConfigError
from polymux.transport.head_slices import MAX_RANKS
from polymux.transport.messages import Role

DType = Literal["auto", "float32", "bfloat16", "float16"]
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,127}$"
_HASHED = "sha256:"


class ModelConfig(Section):
    name: str = Field(pattern=MODEL_NAME, description="what clients call the model: letters, digits and ._/:@+-, at most 128")
    path: str = Field(min_length=1, description="a Hugging Face checkpoint: a directory, or a hub id where there is network")
    dtype: DType = Field(default="auto", description="dtype of weights and activations; auto takes the checkpoint's")
    max_model_len: AutoCount = Field(default=None, description="tokens of prompt and output together, at most; auto takes the checkpoint's")
    slo: Literal["interactive", "batch"] = Field(default="interactive", description="sets TTFT and TPOT where they are not given")
    ttft_slo_s: Seconds | None = Field(default=None, description="target time to first token, such as 2s")
    tpot_slo_s: Seconds | None = Field(default=None, description="target time per output token after it, such as 50ms")
    pin: bool = Field(default=False, description="keep it resident on every worker that has it")
    chat_template: str | None = Field(default=None, description="path of a Jinja file in the place of the checkpoint's template")

    @property
    def slos(self) -> tuple[float, float]:
        """TTFT and TPOT in seconds, class defaults filled in."""
        slo = CLASSES[self.slo]
        return self.ttft_slo_s or slo.ttft_s, self.tpot_slo_s or slo.tpot_s


class PoolConfig(Section):
    workers: int = Field(default=1, ge=1, le=4096, description="number of workers")
    tensor_parallel: int = Field(
        default=1, ge=1, le=MAX_RANKS, description="ranks of one worker: processes that share every model and its KV; on GPUs one for each"
    )
    num_threads: AutoCount = Field(default=None, description="compute threads of one rank; auto divides the host's cores")
    arena_bytes: AutoBytes = Field(default=None, description="memory of one rank, weights and KV, such as 64MiB; auto fits its models")
    num_cpus: float | None = Field(
        default=None,
        ge=0,
        description="CPUs that Ray reserves for one rank; unset: its threads, on a GPU one, or what the hosts have for each",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="what workers compute on; auto: GPUs where there are some")
    num_gpus: AutoNumber = Field(
        default=None, description="GPUs that Ray reserves for one worker; auto: one for each rank; for one rank a share where GPUs are few"
    )
    resources: dict[str, float] = Field(default={}, description="custom Ray resources of one worker")

    @model_validator(mode="after")
    def _gpus_are_whole_or_shared(self) -> Self:
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"num_gpus={self.num_gpus:g} must be a whole number or a share below 1, which workers of one GPU add up to")
        return self


class PoolsConfig(Section):
    prefill: PoolConfig = Field(default=PoolConfig(), description="workers that compute prompts")
    decode: PoolConfig = Field(default=PoolConfig(), description="workers that make the tokens after the first")
    split: Literal["fixed", "auto", "shared"] = Field(
        default="fixed",
        description="auto: workers change sides with the load, without being drained; shared: all do both, each prompt where it decodes",
    )

    def of(self, role: Role) -> PoolConfig:
        return self.prefill if role is Role.PREFILL else self.decode

    @property
    def num_ranks(self) -> int:
        """Processes of all workers together."""
        return sum(pool.workers * pool.tensor_parallel for pool in (self.prefill, self.decode))

    @property
    def degrees(self) -> tuple[int, ...]:
        """How many ranks share a model, on the one worker or the other."""
        return tuple(sorted({self.prefill.tensor_parallel, self.decode.tensor_parallel}))


class EngineConfig(Section):
    batch_invariant: bool = Field(default=False, description="a request's tokens do not depend on its neighbours, to the bit; slower")
    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="sequences in one decode batch of a model")
    max_num_batched_tokens: int = Field(default=512, ge=16, le=1 << 20, description="token budget of one prefill step")
    block_size: Literal[16] = Field(default=16, description="token slots in a KV block; 16 is what the kernels are built for")
    prefix_caching: bool = Field(default=True, description="prompts that begin alike share their KV; see cache_salt in the API")
    weight_layout: Literal["auto", "plain", "onednn"] = Field(default="auto", description="how weights lie in memory; auto goes by device")
    kv_fraction: float = Field(default=0.3, gt=0, lt=1, description="share of the arena that weights may borrow, never keep")
    slab_bytes: AutoBytes = Field(default=None, description="unit in which KV memory is given to models; auto fits their blocks")
    rank_timeout_s: Seconds = Field(default=30.0, description="a rank that answers the others no more for so long is lost with its worker")
    probe_interval_s: Seconds = Field(default=10.0, description="how often an idle worker runs a step to show that it can")


class PoliciesConfig(Section):
    prefill: str = Field(default="deadline", description="which prompts are computed next")
    decode: str = Field(default="slack", description="which model's turn it is")
    max_group_size: int = Field(default=8, ge=1, le=1024, description="prompts of one model computed in a row while others wait")
    max_quota_s: Seconds = Field(default=4.0, description="longest turn of one model while others wait")
    rebalance: bool = Field(default=True, description="move a model's batch to another decode worker, KV and all, where that pays")

    @model_validator(mode="after")
    def _known(self) -> Self:
        self.prefill_policy()
        self.turn_policy()
        return self

    def prefill_policy(self) -> PrefillPolicy[Any]:
        return prefill_policy(self.prefill, max_group_size=self.max_group_size)

    def turn_policy(self) -> TurnPolicy[Any]:
        return turn_policy(self.decode, max_quota_s=self.max_quota_s)


class LimitsConfig(Section):
    max_queued_requests: int = Field(default=512, ge=1, description="sequences that may wait for a first token; more get 503")
    max_queued_tokens: int = Field(default=262_144, ge=16, description="prompt tokens that may wait; more get 503")
    max_inflight_requests: int = Field(default=4096, ge=1, description="requests between admission and release")
    max_body_bytes: Bytes = Field(default=4 << 20, description="largest HTTP body; more is 413")
    request_timeout_s: Seconds = Field(default=600.0, description="deadline of a request that names none, and the longest it may name")
    max_choices: int = Field(default=16, ge=1, le=128, description="largest n of a request")
    max_logprobs: int = Field(default=20, ge=0, le=100, description="largest top_logprobs of a request")
    max_models: int = Field(default=1024, ge=1, description="models that may be registered")
    ttft_refusal_factor: float | None = Field(
        default=4.0, gt=0, description="refuse a request whose predicted TTFT is this many times its SLO while others wait; null never does"
    )


def _hashed(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Keys by their SHA-256. Raises ValueError for one that is empty, short or a broken hash; never shows it."""
    hashed = []
    for key in keys:
        if key.startswith(_HASHED):
            if len(key) != len(_HASHED) + 64 or set(key[len(_HASHED) :]) - set("0123456789abcdef"):
                raise ValueError("holds a hash that is not sha256: and 64 hex digits")
            hashed.append(key)
        elif len(key) < 8 or not key.isprintable() or " " in key:
            raise ValueError("holds a key that is shorter than 8 characters or has blanks")
        else:
            hashed.append(_HASHED + hashlib.sha256(key.encode()).hexdigest())
    return tuple(dict.fromkeys(hashed))


class SecurityConfig(Section):
    """Secrets. Keys are kept as hashes only; `repr` and redacted dumps show neither."""

    api_keys: Annotated[tuple[str, ...], AfterValidator(_hashed)] = Field(
        default=(), repr=False, description="keys that clients must present, plain or as sha256:HEX; none leaves the server open"
    )
    cluster_token: str = Field(
        default_factory=lambda: secrets.token_hex(32),
        min_length=16,
        repr=False,
        description="secret of at least 16 characters shared by front doors and workers",
    )

    def accepts(self, key: str | None) -> bool:
        """Whether a client with this key may come in. Takes the same time for every wrong key."""
        if not self.api_keys:
            return True
        given = _HASHED + hashlib.sha256((key or "").encode()).hexdigest()
        return sum(hmac.compare_digest(given, known) for known in self.api_keys) > 0


class CostsConfig(Section):
    path: str | None = Field(
        default=None, description="folder in which workers keep what they learned of their costs, a file per kind of device; unset: nowhere"
    )


class TransportConfig(Section):
    backend: Literal["auto", "local", "cuda_ipc", "nccl", "shm", "tcp"] = Field(
        default="auto",
        description="how KV moves; auto: between GPUs cuda_ipc on one host, else nccl; in host memory shm on one host, else tcp",
    )
    listen_host: str | None = Field(default=None, description="address that workers listen on; unset takes loopback, for one host")
    transfer_timeout_s: Seconds = Field(default=10.0, description="shortest deadline of one KV transfer")


class StoreConfig(Section):
    budget_bytes: AutoBytes = Field(default=None, description="host memory of a node for weight images; auto holds every model")
    kv_bytes: AutoSize = Field(
        default=None,
        description="host memory of a node for KV of preempted sequences; auto: an eighth of the host's; 0: none, compute it again",
    )


class LivenessConfig(Section):
    report_interval_s: Seconds = Field(default=1.0, description="how often a worker reports")
    worker_lease_s: Seconds = Field(default=10.0, description="a worker silent for so long is lost")
    client_lease_s: Seconds = Field(default=15.0, description="a front door silent for so long is gone, and its requests with it")
    reap_grace_s: Seconds = Field(default=5.0, description="how long after its deadline a request that was not released is dropped")
    ready_step_age_s: Seconds = Field(default=30.0, description="a busy worker without a step for so long is not ready")
    orphan_timeout_s: Seconds | None = Field(default=60.0, description="stop all when no front door called for so long; null never does")

    @model_validator(mode="after")
    def _leases_outlast_reports(self) -> Self:
        if self.worker_lease_s < 2 * self.report_interval_s:
            raise ValueError(
                f"worker_lease_s={self.worker_lease_s} is below two report intervals ({self.report_interval_s} s each); one late report "
                "would lose a worker"
            )
        return self


class ServeConfig(Section):
    host: str = Field(default="127.0.0.1", description="address that HTTP listens on; 0.0.0.0 for all")
    port: int = Field(default=8000, ge=0, le=65535, description="HTTP port; 0 picks a free one")
    ingress: Literal["direct", "proxy"] = Field(
        default="direct",
        description="direct: replicas listen themselves, which is faster; proxy: Ray Serve's proxy does. For polymux serve",
    )
    route_prefix: str = Field(default="/", pattern=r"^/", description="path under which the API lies")
    replicas: int = Field(default=1, ge=1, le=256, description="front-door replicas")
    max_ongoing_requests: int = Field(default=1024, ge=1, description="requests that one replica holds at a time")


class ClusterConfig(Section):
    """Everything about one cluster. `ClusterConfig()` is valid: no models yet, one worker of each role."""

    name: str = Field(default="polymux", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="of its actors and of its Serve application")
    models: tuple[ModelConfig, ...] = Field(default=(), description="models to serve, each with a name and a path")
    pools: PoolsConfig = Field(default=PoolsConfig(), description="workers by role")
    engine: EngineConfig = Field(default=EngineConfig(), description="what one worker does in one step")
    policies: PoliciesConfig = Field(default=PoliciesConfig(), description="who decides what runs next")
    costs: CostsConfig = Field(default=CostsConfig(), description="seconds of steps and switches, as learned while serving")
    limits: LimitsConfig = Field(default=LimitsConfig(), description="what is refused at the door")
    security: SecurityConfig = Field(default_factory=lambda: SecurityConfig(), description="keys and tokens")
    transport: TransportConfig = Field(default=TransportConfig(), description="how bytes move between workers")
    store: StoreConfig = Field(default=StoreConfig(), description="weight images and swapped KV in host memory")
    liveness: LivenessConfig = Field(default=LivenessConfig(), description="leases and time-outs")
    serve: ServeConfig = Field(default=ServeConfig(), description="the HTTP front door")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="the least severe event that is logged")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [model.name for model in self.models]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"models has {', '.join(doubled)} twice; each needs a name of its own")
        if len(names) > self.limits.max_models:
            raise ValueError(f"models has {len(names)} entries, limits.max_models allows {self.limits.max_models}")
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "configuration") -> ClusterConfig:
        """From plain data, as `to_dict` gives it. Raises ConfigError."""
        return validated(cls, data, source=source)

    def to_dict(self, *, show_secrets: bool = False) -> dict[str, Any]:
        """Plain data. Without secrets it is for eyes only: `from_dict` refuses it, rather than opening a server that was closed."""
        data = self.model_dump(mode="json")
        if not show_secrets:
            data["security"] = {"api_keys": ["***"] * len(self.security.api_keys), "cluster_token": "***"}
        return data

    @classmethod
    def load(
        cls, path: str | Path | None = None, *, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> ClusterConfig:
        """From a YAML file (none: the defaults), the environment, and overrides such as "engine.max_num_seqs=8". Raises ConfigError.

        Model paths that exist beside the file are taken from there.
        """
        data = _read_yaml(Path(path)) if path is not None else {}
        for key, value in settings(os.environ if environ is None else environ).items():
            _set(data, key, value)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ConfigError(f"override {override!r} must be KEY=VALUE, such as engine.max_num_seqs=8")
            _set(data, key.strip(), _parse_yaml(text, f"override {override!r}"))
        config = cls.from_dict(data, source=str(path) if path is not None else "configuration")
        return config if path is None else _beside(config, Path(path).resolve().parent)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    data = _parse_yaml(text, str(path))
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(data).__name__}")
    return data or {}


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        inner = data.get(parent)
        if inner is None:
            inner = data[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path} cannot be set: {parent} is not a section but {inner!r:.40}", param=path)
        data = inner
    data[last] = value


def _beside(config: ClusterConfig, folder: Path) -> ClusterConfig:
    """Paths that exist beside the file are taken from there."""

    def there(path: str | None) -> str | None:
        return str(folder / path) if path is not None and (folder / path).exists() else path

    models = tuple(
        model.model_copy(update={"path": there(model.path), "chat_template": there(model.chat_template)}) for model in config.models
    )
    return config.model_copy(update={"models": models})
