"""Processes of the scripted peers, forked from one that has imported already what they import: torch alone takes seconds.

The nursery is a process of its own, started when it is first asked. It has one thread and has loaded neither CUDA nor NCCL nor their
stand-in, so that a fork of it is as good as a process that was started; what a library reads of its environment as it is loaded with
torch (OMP_NUM_THREADS) is the nursery's. Where an import has left threads, which no fork has, each child starts Python anew. It kills
its children when its socket ends, in whatever way whoever asked for them has ended.

A request is one packet of JSON. `{"run": [module, *arguments], "env": ...}`, with standard input, output and error as descriptors, is
answered by a process id; `{"wait": id}` by a return code as of `subprocess`, or null while it runs. A process that nobody has asked for
since it ended is still there, so that a signal never meets another one of the same id.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__)
NAMESPACE = SCRIPT.parents[2] / ".namespace"
MODULES = ("kv_peer", "rank_memory", "rank_peer")
ALSO = ("torch", "polymux.transport.cuda.mover", "polymux.transport.nccl.comm")  # what they import as they need it
PACKET_BYTES = 1 << 18
START_S = ANSWER_S = 60.0


class Forked:
    """A child of the nursery, as `subprocess.Popen` shows one; its pipes carry bytes."""

    def __init__(self, nursery: Nursery, words: list[str], env: dict[str, str]) -> None:
        self._nursery = nursery
        self.returncode: int | None = None
        its_input, to_it = os.pipe()
        from_it, its_output = os.pipe()
        self.stdin, self.stdout = os.fdopen(to_it, "wb"), os.fdopen(from_it, "rb")
        try:
            self.pid: int = nursery.ask({"run": words, "env": env}, (its_input, its_output, 2))
        finally:
            os.close(its_input)
            os.close(its_output)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask({"wait": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        until_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def bury(self) -> None:
        self.kill()
        self.wait(10)
        for pipe in (self.stdin, self.stdout):
            pipe.close()


class Nursery:
    """The end of it that asks; from any thread."""

    def __init__(self, *, starts_anew: bool = False) -> None:
        """`starts_anew`: as if it had more threads than one."""
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join([str(NAMESPACE), str(SCRIPT.parent)])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            words = [sys.executable, str(SCRIPT), str(theirs.fileno()), *(["anew"] if starts_anew else [])]
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=env, pass_fds=[theirs.fileno()])
        self._socket.settimeout(START_S)
        assert self._socket.recv(PACKET_BYTES) == b"ready", "the nursery has not started"
        self._socket.settimeout(ANSWER_S)

    def ask(self, request: dict[str, Any], fds: tuple[int, ...] = ()) -> Any:
        with self._lock:
            packet = json.dumps(request).encode()
            if fds:
                socket.send_fds(self._socket, [packet], fds)
            else:
                self._socket.send(packet)
            answer = self._socket.recv(PACKET_BYTES)
        assert answer, "the nursery has ended"
        return json.loads(answer)

    def fork(self, module: str, *arguments: str, **env: str) -> Forked:
        """`main` of one of MODULES in a process of its own, whose environment is this one's and `env`."""
        return Forked(self, [module, *arguments], os.environ | env)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


@cache
def nursery() -> Nursery:
    """This process's; it ends with it."""
    made = Nursery()
    atexit.register(made.close)
    return made


@contextmanager
def ending_all(children: set[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


def serve(requests: socket.socket, *, starts_anew: bool) -> None:
    children: set[int] = set()
    with ending_all(children):
        while True:
            packet, fds, _, _ = socket.recv_fds(requests, PACKET_BYTES, 3)
            if not packet:
                return
            request = json.loads(packet)
            if "wait" in request:
                pid, status = os.waitpid(request["wait"], os.WNOHANG)
                children.discard(pid)
                requests.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
                continue
            pid = os.fork()
            if not pid:
                requests.close()
                become(request["run"], request["env"], fds, starts_anew=starts_anew)
            children.add(pid)
            for fd in fds:
                os.close(fd)
            requests.send(json.dumps(pid).encode())


def become(words: list[str], env: dict[str, str], fds: list[int], *, starts_anew: bool) -> None:
    """Run a module's `main` in this fork, and end."""
    code = 1
    try:
        for at, fd in enumerate(fds):
            os.dup2(fd, at)
            os.close(fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if starts_anew:
            code_of = f"import sys, {words[0]}; sys.argv = {words!r}; {words[0]}.main()"
            os.execve(sys.executable, [sys.executable, "-c", code_of], env | {"PYTHONPATH": os.environ["PYTHONPATH"]})
        os.environ.clear()
        os.environ.update(env)
        sys.argv, sys.stdin = words, open(0, closefd=False)  # noqa: SIM115 - it ends with the process
        importlib.import_module(words[0]).main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its socket
    for name in (*ALSO, *MODULES):
        importlib.import_module(name)
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    gc.freeze()  # so that no collection writes to the pages that forks share
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.send(b"ready")
    serve(requests, starts_anew=num_threads > 1 or "anew" in sys.argv)


if __name__ == "__main__":
    main()
