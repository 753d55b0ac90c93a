"""What Ray's tasks ask a host or a bundle. Imports next to nothing, for each may cost the start of a process."""

from __future__ import annotations

import ray

from polymux.cluster import gpu_topology
from polymux.cluster.gpu_topology import HostGpus


def look() -> tuple[HostGpus, str]:
    """A host's GPUs, and why no worker there could compute on them."""
    gpus, _ = gpu_topology.read()
    return gpus, gpu_topology.why_unusable()


def where() -> tuple[str, list[str]]:
    """The node of a bundle, and its GPUs as Ray names them."""
    return str(ray.get_runtime_context().get_node_id()), [str(one) for one in ray.get_gpu_ids()]
