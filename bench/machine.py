"""The line that every benchmark prints first: on what it ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "triton", "ray", "transformers", "starlette", "uvicorn", "numpy")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> str:
    """Commit, CPU with its vector features, cores, kernel, Python and package versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    features = "/".join(feature for feature in FEATURES if feature in flags)
    versions = ", ".join(f"{package} {version}" for package in PACKAGES if (version := _version(package)))
    return (
        f"commit {_commit()}; {model} ({features or 'no listed vector features'}), {os.cpu_count()} cores, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {versions}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or "unknown"
