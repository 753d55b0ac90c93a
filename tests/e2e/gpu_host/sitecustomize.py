"""A host with GPUs for whole commands: first on PYTHONPATH, it makes workers' devices stand-ins, in every process that Python starts.

What is put in place of the missing hardware is named in REPLACED, and nothing else is: which device a pool gets, gangs, arenas, edges, the
protocols between ranks and the front door are the program's own. NVML is the player beside `tests/cluster`, and Ray is told its GPUs by
RAY_OVERRIDE_RESOURCES.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _computes_here(module: ModuleType) -> None:
    module.why_unusable = lambda: ""  # type: ignore[attr-defined]


def _sees_gpus(module: ModuleType) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ["GPU_HOST_SEES"])
    module.device_count = lambda: len(visible.split(","))  # type: ignore[attr-defined]


def _is_a_stand_in(module: ModuleType) -> None:
    # two processes with the same one are on one device
    os.environ["STAND_IN_UUID"] = f"GPU-{os.environ.get('CUDA_VISIBLE_DEVICES', 'none')}"
    os.environ["TRITON_INTERPRET"] = "1"
    device = importlib.import_module("rank_gpus").RankGpu
    importlib.import_module("polymux.kernels.choice").override("all=torch").__enter__()
    module.CudaDevice = device  # type: ignore[attr-defined]


REPLACED: dict[str, Callable[[ModuleType], None]] = {
    "torch.cuda": _sees_gpus,
    "polymux.cluster.gpu_topology": _computes_here,
    "polymux.actors.gpu.device": _is_a_stand_in,
}


class _Replacing(Loader):
    """Loads a module as it is found, and replaces what is to be replaced in it."""

    def __init__(self, loader: Loader, replace: Callable[[ModuleType], None]) -> None:
        self._loader, self._replace = loader, replace

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._replace(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REPLACED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Replacing(spec.loader, REPLACED[name])
        return spec


sys.meta_path.insert(0, _Finder())
