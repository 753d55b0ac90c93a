"""What this machine lacks for serving, or has too little of, and the fix for each: the checks behind `polymux doctor`.

Each check is a plain function from what was measured to a finding, so that a test can show it any machine. Nothing here changes anything.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymux.deploy.findings import Finding, Level
from polymux.deploy.ray_token import token_source

GIB = 1 << 30
MIB = 1 << 20
LOW_FILES = 4096  # a front door holds a descriptor for each open stream
LOW_MEMORY = 2 * GIB  # Ray takes about 0.4 GiB, and each worker 0.25 GiB beside its arena
LOW_SHM = 128 * MIB  # of Ray's object store, as polymux starts it
LOW_DISK = GIB  # Ray warns, and spills nothing, on a full disk
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000  # where the configuration cannot even be read
MAX_SOCKET_PATH = 107  # bytes that Linux allows
RAY_SOCKET = "/polymux-ray-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A distribution that polymux needs: at least `low`, below `high`. `extra` is what brings it, empty for the core."""

    name: str
    low: str
    high: str = ""
    extra: str = ""


PACKAGES = (
    Package(name="httpx", low="0.27", high="1"),
    Package(name="pydantic", low="2.8", high="3"),
    Package(name="rich", low="13.7"),
    Package(name="typer", low="0.12"),
    Package(name="ray", low="2.60", high="2.62", extra="serve"),
    Package(name="torch", low="2.11", high="2.14", extra="serve"),
    Package(name="numpy", low="1.26", extra="serve"),
    Package(name="msgpack", low="1.1", high="2", extra="serve"),
    Package(name="safetensors", low="0.5", high="1", extra="serve"),
    Package(name="tokenizers", low="0.21", high="1", extra="serve"),
    Package(name="starlette", low="0.40", extra="serve"),
    Package(name="uvicorn", low="0.30", extra="serve"),
    Package(name="jinja2", low="3.1", high="4", extra="serve"),
    Package(name="pyyaml", low="6", high="7", extra="serve"),
    Package(name="prometheus-client", low="0.20", extra="serve"),
    Package(name="blake3", low="1", high="2", extra="serve"),
)


def examine(
    environ: Mapping[str, str],
    *,
    config: Path | None = None,
    settings: Sequence[str] = (),
    host: str | None = None,
    port: int | None = None,
) -> list[Finding]:
    """Every check, on this machine, for a cluster as `polymux serve` would configure it. Imports torch, if it is there.

    Raises ConfigError for a file or a setting that cannot be followed.
    """
    try:
        from polymux.deploy.cli_config import load
        from polymux.deploy.doctor_gpu import examine as look

        asked = load(config, settings, environ)
        computing = look(asked)
        host, port = host or asked.serve.host, asked.serve.port if port is None else port
    except ImportError as error:
        computing = [
            Finding(name="gpu", level=Level.NOTE, found=f"cannot ask: {error}", fix="install what is missing above, then look again")
        ]
    has_gpu = any(one.name == "device" and "on cuda" in one.found for one in computing)
    return [
        python(sys.version_info[:3]),
        system(platform.system(), platform.machine()),
        *(package(one, installed(one.name)) for one in PACKAGES),
        cpu(cpu_flags(), num_cores()),
        *computing,
        memfd(),
        shared_memory(shm_bytes()),
        memory(memory_bytes()),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_gpu=has_gpu),
        temporary(tempfile.gettempdir(), can_use_tmp=os.access("/tmp", os.W_OK)),
        listening(host or DEFAULT_HOST, DEFAULT_PORT if port is None else port),
        ray_token(environ),
        ray_cluster(environ),
    ]


# -- software -----------------------------------------------------------------------------------------------------------------------


def python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(name="python", level=Level.MISSING, found=text, fix="use Python 3.11 or later")
    return Finding(name="python", level=Level.OK, found=text)


def system(name: str, machine: str) -> Finding:
    if name != "Linux":
        return Finding(
            name="system", level=Level.MISSING, found=f"{name} {machine}", fix="serve on Linux (arenas are memfds); clients run anywhere"
        )
    return Finding(name="system", level=Level.OK, found=f"{name} {machine}")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package(needed: Package, version: str | None) -> Finding:
    wanted = f"{needed.name}>={needed.low}" + (f",<{needed.high}" if needed.high else "")
    brings = f"pip install 'polymux[{needed.extra}]'" if needed.extra else "pip install polymux"
    if version is None:
        return Finding(name=needed.name, level=Level.MISSING, found="not installed", fix=f"{brings}, which brings {wanted}")
    at = release(version)
    if at < release(needed.low) or (needed.high and at >= release(needed.high)):
        return Finding(name=needed.name, level=Level.MISSING, found=version, fix=f"pip install '{wanted}'")
    return Finding(name=needed.name, level=Level.OK, found=version)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13), as trailing zeros say nothing."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# -- hardware -----------------------------------------------------------------------------------------------------------------------


def cpu_flags() -> frozenset[str]:
    """The features of the first CPU, as the kernel names them."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu(flags: frozenset[str], num_cores: int) -> Finding:
    wide = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16", "sve") if flag in flags]
    found = f"{num_cores} cores, {' '.join(wide) or 'no vector features known to us'}"
    if num_cores < 2:
        return Finding(
            name="cpu", level=Level.TIGHT, found=found, fix="give it two cores or more: prefill and decode workers share one now"
        )
    if not flags & {"amx_bf16", "avx512_bf16", "bf16"}:
        return Finding(name="cpu", level=Level.NOTE, found=found, fix="bfloat16 is emulated on this CPU; --dtype float32 may be faster")
    return Finding(name="cpu", level=Level.OK, found=found)


# -- memory -------------------------------------------------------------------------------------------------------------------------


def memfd() -> Finding:
    try:
        fd = os.memfd_create("polymux-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as error:
        fix = "run on Linux 3.17 or later, with a seccomp profile that allows memfd_create"
        return Finding(name="memfd", level=Level.MISSING, found=f"not available: {error}", fix=fix)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        return Finding(
            name="memfd", level=Level.MISSING, found=f"cannot be sealed: {error}", fix="allow fcntl F_ADD_SEALS in the seccomp profile"
        )
    finally:
        os.close(fd)
    return Finding(name="memfd", level=Level.OK, found="available, with seals")


def shm_bytes() -> int:
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0


def shared_memory(nbytes: int) -> Finding:
    found = f"{nbytes / MIB:.0f} MiB"
    if nbytes < LOW_SHM:
        fix = "Ray's object store wants 128 MiB: docker run --shm-size=1g, or an emptyDir of medium Memory at /dev/shm in Kubernetes"
        return Finding(name="/dev/shm", level=Level.TIGHT, found=found, fix=fix)
    return Finding(name="/dev/shm", level=Level.OK, found=found)


def memory_bytes() -> int:
    """Memory of this host, or of the control group that confines this process, whichever is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).exists() else "max"
        if text.isdigit():
            total = min(total, int(text))
    return total


def memory(nbytes: int) -> Finding:
    found = f"{nbytes / GIB:.1f} GiB"
    if nbytes < LOW_MEMORY:
        fix = "raise the limit to 2 GiB or more (Ray takes 0.4, each worker 0.25 beside its arena), or set smaller pools.*.arena_bytes"
        return Finding(name="memory", level=Level.TIGHT, found=found, fix=fix)
    return Finding(name="memory", level=Level.OK, found=found)


def open_files(limit: int) -> Finding:
    found = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    if limit != resource.RLIM_INFINITY and limit < LOW_FILES:
        return Finding(
            name="open files",
            level=Level.TIGHT,
            found=found,
            fix=f"ulimit -n 65536: each stream takes one, Ray takes about {LOW_FILES // 4}",
        )
    return Finding(name="open files", level=Level.OK, found=found)


def locked_memory(limit: int, *, has_gpu: bool) -> Finding:
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / MIB:.0f} MiB"
    if has_gpu and limit != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited, so that weight images can be pinned for a GPU"
        return Finding(name="locked memory", level=Level.NOTE, found=found, fix=fix)
    return Finding(name="locked memory", level=Level.OK, found=found)


def temporary(folder: str, *, can_use_tmp: bool) -> Finding:
    """Ray puts its logs and sockets there, and a unix socket's path is short; where it would be too long, /tmp serves."""
    name, length = "temporary files", len(os.fsencode(folder + RAY_SOCKET))
    if not os.access(folder, os.W_OK):
        return Finding(name=name, level=Level.MISSING, found=f"{folder} is not writable", fix="set TMPDIR to a directory that is")
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / GIB:.1f} GiB free"
    if length > MAX_SOCKET_PATH and not can_use_tmp:
        fix = f"set TMPDIR to a path of {MAX_SOCKET_PATH - len(RAY_SOCKET)} bytes at most: Ray's unix sockets lie below it"
        return Finding(name=name, level=Level.MISSING, found=found, fix=fix)
    if free < LOW_DISK:
        return Finding(name=name, level=Level.TIGHT, found=found, fix="free some space, or set TMPDIR to a larger disk")
    return Finding(name=name, level=Level.OK, found=found)


# -- network and Ray ----------------------------------------------------------------------------------------------------------------


def listening(host: str, port: int) -> Finding:
    name = f"port {port}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and (server := polymux_at(host, port)):
                fix = "to serve beside it, give another --port; 0 picks a free one"
                return Finding(name=name, level=Level.NOTE, found=f"polymux {server} serves on {host}", fix=fix)
            if error.errno == errno.EADDRINUSE:
                fix = f"stop what listens there (ss -ltnp 'sport = :{port}' names it), or serve with --port 0 or another"
                return Finding(name=name, level=Level.MISSING, found=f"in use on {host}", fix=fix)
            return Finding(
                name=name,
                level=Level.MISSING,
                found=f"{host}: {error.strerror}",
                fix="give --host an address of this machine, --port one above 1023",
            )
    return Finding(name=name, level=Level.OK, found=f"free on {host}")


def polymux_at(host: str, port: int) -> str | None:
    """The version of the polymux that answers there, if one does."""
    import httpx

    try:
        answer = httpx.get(f"http://{f'[{host}]' if ':' in host else host}:{port}/version", timeout=2.0).json()
    except (httpx.HTTPError, ValueError):
        return None
    return str(answer["version"]) if isinstance(answer, dict) and "version" in answer else None


def ray_token(environ: Mapping[str, str]) -> Finding:
    """Who may run code on the Ray that serves: whoever has its token, or reaches its ports where tokens are off."""
    name, mode, source = "ray token", environ.get("RAY_AUTH_MODE", "").lower(), token_source(environ)
    if mode == "disabled":
        fix = "unset RAY_AUTH_MODE, unless the network around the cluster keeps others out: whoever reaches Ray's ports runs code"
        return Finding(name=name, level=Level.NOTE, found="RAY_AUTH_MODE=disabled", fix=fix)
    if source is None and environ.get("RAY_ADDRESS") and mode == "token":
        fix = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        return Finding(name=name, level=Level.MISSING, found=f"none, and {environ['RAY_ADDRESS']} asks for one", fix=fix)
    return Finding(name=name, level=Level.OK, found=f"from {source}" if source else "a new one is made for each Ray of our own")


def ray_cluster(environ: Mapping[str, str]) -> Finding:
    address = environ.get("RAY_ADDRESS")
    found = f"`polymux serve` joins {address} (RAY_ADDRESS)" if address else "`polymux serve` starts a Ray of its own"
    return Finding(name="ray cluster", level=Level.OK, found=found)
