"""What one front-door replica needs to know, in two frozen values: of its connections and requests, and of HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field

from polymux.transport.errors import ConfigError
from polymux.transport.units import MIB, ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoorSettings:
    """How requests run, HTTP aside."""

    client_id: ClientId  # unique among front doors, and new with each start
    token: str = field(repr=False)  # the cluster's shared secret
    request_timeout_s: float = 600.0  # deadline of a request that names none, and the longest it may name
    max_open_requests: int = 1024
    max_pending_updates: int = 65_536  # of one request, received and not yet read by its client
    max_replays: int = 4  # of one sequence, each after a worker was lost
    connect_timeout_s: float = 5.0
    control_timeout_s: float = 10.0  # of one call to the controller
    heartbeat_interval_s: float = 3.0  # well within the controller's client lease
    models_ttl_s: float = 1.0  # how long the list of models is believed
    drain_timeout_s: float = 30.0  # for open requests to end when the front door closes

    def __post_init__(self) -> None:
        for name in ("request_timeout_s", "connect_timeout_s", "control_timeout_s", "heartbeat_interval_s", "drain_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0", param=name)
        for name in ("max_open_requests", "max_pending_updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1", param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """How HTTP is spoken."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)  # as "sha256:HEX"; none leaves the server open
    max_body_bytes: int = 4 * MIB
    body_timeout_s: float = 30.0  # for a client to send its body
    max_choices: int = 16  # largest n
    max_sequences: int = 256  # prompts times n of one request
    max_logprobs: int = 20
    use_generation_config: bool = True  # sampling defaults from the model's generation_config.json, else neutral ones
    keep_alive_s: float = 15.0  # silence on a stream after which a comment is sent
    first_byte_s: float = 15.0  # a stream's 200 waits so long for the first token or an error

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_timeout_s", "max_choices", "max_sequences", "keep_alive_s", "first_byte_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0", param=name)
        for key in self.api_keys:
            if not key.startswith("sha256:") or len(key) != 71:
                raise ConfigError("api_keys holds a key that is not hashed; give sha256: and the 64 hex digits", param="api_keys")
