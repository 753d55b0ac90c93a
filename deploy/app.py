"""The Ray Serve application: thin. A replica finds the controller (or starts it), opens its front door, and speaks HTTP.

serve run polymux.deploy.app:demo                      the demo models
serve run polymux.deploy.app:build config=my.yaml      a configuration file
serve deploy deploy/serve.yaml                         `build` with the configuration under `args`
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from polymux.cluster.bootstrap import START_S, create_controller, find_controller
from polymux.cluster.config import ClusterConfig
from polymux.cluster.remote import RayControlPlane, call
from polymux.deploy.http.api import build_asgi
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.settings import FrontDoorSettings, HttpSettings
from polymux.deploy.listener import Listening, bind
from polymux.transport.errors import ConfigError, WorkerLost
from polymux.transport.units import ClientId

log = logging.getLogger("polymux.app")

DEMO_CONFIG = Path(__file__).parent / "demo" / "demo.yaml"
FRONT_DOOR_CPUS = 0.1  # bookkeeping: a replica waits far more than it computes
FRONT_DOOR_ENVIRONMENT = {"RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000"}  # Serve wakes every replica for this ten times a second
DRAIN_S = 20.0  # for open streams to end when a replica or the whole application goes


class FrontDoorReplica:
    """One front-door process. `config` is plain data; the running controller's own configuration outranks it.

    `listens`: it opens the configured port itself, for there is no proxy.
    """

    async def __init__(self, config: dict[str, Any], listens: bool) -> None:  # type: ignore[misc] # Ray Serve awaits it
        wanted = ClusterConfig.from_dict(config)
        actor = create_controller(wanted)
        async with asyncio.timeout(START_S):
            await call(actor.start.remote())
            running: ClusterConfig = await call(actor.config.remote())
            await self._reconcile(actor, wanted, running)
        app = build_asgi(_front_door(running, RayControlPlane(actor)), _http_settings(running))
        self._app: ASGIApp = Listening(app, wanted.serve, DRAIN_S) if listens else app

    async def _reconcile(self, actor: Any, wanted: ClusterConfig, running: ClusterConfig) -> None:
        """Models that a new configuration adds are registered; what else differs waits for a restart, and the log says so."""
        known = {spec.model for spec in await call(actor.models.remote())}
        for model in wanted.models:
            if model.name not in known:
                await call(actor.add_model.remote(model))
        ours, theirs = (c.model_dump(exclude={"models", "security", "serve"}) for c in (wanted, running))
        changed = sorted(key for key in ours if ours[key] != theirs[key])
        if changed:
            log.warning("app.config_differs sections=%s the running cluster keeps its own until it is stopped", ",".join(changed))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


def _front_door(config: ClusterConfig, control: RayControlPlane) -> FrontDoor:
    settings = FrontDoorSettings(
        client_id=ClientId(f"front-{uuid.uuid4().hex[:12]}"),
        token=config.security.cluster_token,
        request_timeout_s=config.limits.request_timeout_s,
        max_open_requests=config.serve.max_ongoing_requests,
        drain_timeout_s=DRAIN_S,
    )
    return FrontDoor(settings, control)


def _http_settings(config: ClusterConfig) -> HttpSettings:
    return HttpSettings(
        api_keys=config.security.api_keys,
        max_body_bytes=config.limits.max_body_bytes,
        max_choices=config.limits.max_choices,
        max_logprobs=config.limits.max_logprobs,
    )


def application(config: ClusterConfig, *, listens: bool = False) -> Application:
    """The Serve application of one configuration, behind Serve's proxy unless its replicas listen themselves."""
    deployment = serve.deployment(
        name="front-door",
        num_replicas=config.serve.replicas,
        max_ongoing_requests=config.serve.max_ongoing_requests,
        graceful_shutdown_timeout_s=DRAIN_S,
        health_check_period_s=10,
        ray_actor_options={"num_cpus": FRONT_DOOR_CPUS, "runtime_env": {"env_vars": FRONT_DOOR_ENVIRONMENT}},
    )
    ingress: type[FrontDoorReplica] = serve.ingress(None)(FrontDoorReplica)
    bound: Application = deployment(ingress).bind(config.to_dict(show_secrets=True), listens)
    return bound


def build(args: Mapping[str, Any]) -> Application:
    """For `serve run` and `serve deploy`: `args` is a ClusterConfig as plain data; `config` names a YAML file that the rest overrides.

    Raises ConfigError.
    """
    rest = dict(args)
    path = rest.pop("config", None)
    if path is None:
        return application(ClusterConfig.from_dict(rest, source="args"))
    if not isinstance(path, str):
        raise ConfigError(f"args.config={path!r} must be the path of a YAML file, or `demo`", param="config")
    base = ClusterConfig.load(DEMO_CONFIG if path == "demo" else path)
    return application(ClusterConfig.from_dict(base.to_dict(show_secrets=True) | rest, source="args"))


def demo(_: Mapping[str, Any]) -> Application:
    """The four demo models on three workers."""
    return application(ClusterConfig.load(DEMO_CONFIG))


def start_serving(config: ClusterConfig, *, log_level: str = "WARNING") -> str:
    """Start controller, workers and front doors in the Ray that this process has joined. Returns the base URL once all is up.

    Raises what a worker or a checkpoint raised, as it was raised there.
    """
    listens = config.serve.ingress == "direct"
    if listens:
        with bind(config.serve.host, config.serve.port, is_shared=False) as probe:  # before anything is started for nothing
            serve_config = config.serve.model_copy(update={"port": probe.getsockname()[1]})
        config = config.model_copy(update={"serve": serve_config})
    is_ours = find_controller(config) is None
    actor = create_controller(config)
    try:
        asyncio.run(_started(actor))
        _serve(config, listens=listens, log_level=log_level)
    except BaseException:
        if is_ours:  # it is detached: nobody else would end it before `liveness.orphan_timeout_s`
            _undo(config, actor)
        raise
    host = "127.0.0.1" if config.serve.host in ("0.0.0.0", "::") else config.serve.host
    return f"http://{host}:{config.serve.port}{config.serve.route_prefix.rstrip('/')}"


def _serve(config: ClusterConfig, *, listens: bool, log_level: str) -> None:
    http = {"host": config.serve.host, "port": config.serve.port, "request_timeout_s": None}  # deadlines are the front door's
    location = "Disabled" if listens else "EveryNode"
    serve.start(proxy_location=location, http_options=http, logging_config={"log_level": log_level})
    serve.run(application(config, listens=listens), name=config.name, route_prefix=config.serve.route_prefix)


def _undo(config: ClusterConfig, actor: Any) -> None:
    """Take down what a start that failed has left. The error that made it fail is the one to show."""
    with suppress(Exception):
        serve.delete(config.name)
    with suppress(Exception):
        asyncio.run(_stopped(actor))


async def _started(actor: Any) -> None:
    async with asyncio.timeout(START_S):
        await call(actor.start.remote())


def stop_serving(config: ClusterConfig, *, keep_serve: bool = False) -> None:
    """Drain the front doors, then stop the workers and the controller; and Ray Serve, unless others use it or Ray ends anyway."""
    others = serve.status().applications.keys() - {config.name}
    if keep_serve or others:
        serve.delete(config.name)
    else:
        serve.shutdown()  # type: ignore[no-untyped-call] # goes on by itself if this process is killed meanwhile, as `ray job stop` does
    actor = find_controller(config)
    if actor is not None:
        asyncio.run(_stopped(actor))


async def _stopped(actor: Any) -> None:
    """Returns when the controller's name is free again."""
    async with asyncio.timeout(60.0):
        with suppress(WorkerLost):
            await call(actor.stop.remote())
            while True:
                await call(actor.config.remote())
                await asyncio.sleep(0.1)
