"""The turn policies by name, as `policies.decode` says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polymux.disagg.multiplex import TurnPolicy, WeightedRoundRobin
from polymux.disagg.request_level import RequestLevel
from polymux.disagg.slack import Slack
from polymux.transport.errors import ConfigError

POLICIES: dict[str, Callable[..., TurnPolicy[Any]]] = {"request_level": RequestLevel, "slack": Slack, "wrr": WeightedRoundRobin}


def turn_policy(name: str, **settings: float) -> TurnPolicy[Any]:
    """The policy of that name. Raises ConfigError, naming the ones there are."""
    if name not in POLICIES:
        raise ConfigError(f"policies.decode={name!r} is no turn policy; there are: {', '.join(sorted(POLICIES))}", param="policies.decode")
    return POLICIES[name](**settings)
