"""Find this cluster's controller, or start it: what every front door and every command does first."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from polymux.cluster.config import ClusterConfig
from polymux.cluster.remote import NAMESPACE, ControllerActor
from polymux.transport.errors import PolymuxError
from polymux.transport.units import MIB

START_S = 600.0  # packing a large catalogue takes minutes


def controller_name(config: ClusterConfig) -> str:
    return f"{config.name}-controller"


def find_controller(config: ClusterConfig) -> Any | None:
    """The running controller's handle, or None."""
    try:
        return ray.get_actor(controller_name(config), namespace=NAMESPACE)
    except ValueError:
        return None


def create_controller(config: ClusterConfig) -> Any:
    """The controller's handle, its actor made if there is none; call its `start` before anything else.

    Detached, for it must outlive the job that happened to come first; it stops by itself when no front door has called for
    `liveness.orphan_timeout_s`.
    """
    return (
        ray.remote(ControllerActor)
        .options(
            name=controller_name(config), namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, max_concurrency=1024
        )
        .remote(config)
    )


def start_local_ray(num_ranks: int, temp_dir: str) -> None:
    """A Ray of our own on this host, which ends with this process. Never joins one that runs here already.

    Ray's sockets lie below `temp_dir`, and a unix socket's path holds 107 bytes: keep it under 20. It is the caller's to remove.
    CPUs are bookkeeping: as many as the actors ask for, whatever the host has.
    """
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, num_ranks + 2),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * MIB,
        _temp_dir=temp_dir,
        logging_level=logging.WARNING,
    )


def require_ray(address: str | None) -> None:
    """Join the cluster at `address` (None: RAY_ADDRESS, or the one that this job runs on). Raises PolymuxError when there is none."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=address or "auto", log_to_driver=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise PolymuxError(f"no Ray cluster answers at {address or 'auto'}: {error}; start one, or leave --address out") from error
