"""The nursery's forks are what processes of their own would be, and none outlives whoever asked for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import Forked, Nursery
from processes import until


def main() -> None:
    """Of the forks: say what they have, and then what they hear."""
    has = [os.environ.get("POLYMUX_NAME"), "HOME" in os.environ, threading.active_count(), sys.argv[1:], os.getpid()]
    os.write(1, json.dumps(has).encode() + b"\n")
    os.write(1, sys.stdin.read().encode())
    if "raise" in sys.argv:
        raise RuntimeError("as it was asked to")


@pytest.fixture(scope="module", params=[False, True], ids=["forks", "starts anew"])
def nursery(request: pytest.FixtureRequest) -> Iterator[Nursery]:
    made = Nursery(starts_anew=request.param)
    yield made
    made.close()


@pytest.fixture
def child(nursery: Nursery) -> Iterator[Forked]:
    made = nursery.fork("test_nursery")
    made.stdout.readline()
    yield made
    made.bury()


def test_a_fork_has_its_own_input_output_arguments_and_environment(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMUX_NAME", "this process's")
    monkeypatch.delenv("HOME", raising=False)
    of_this, of_its_own = (nursery.fork("test_nursery", word, **env) for word, env in (("a", {}), ("b", {"POLYMUX_NAME": "its own"})))
    try:
        assert json.loads(of_this.stdout.readline()) == ["this process's", False, 1, ["a"], of_this.pid]
        assert json.loads(of_its_own.stdout.readline()) == ["its own", False, 1, ["b"], of_its_own.pid]
        of_its_own.stdin.write(b"heard")
        of_its_own.stdin.close()
        assert of_its_own.stdout.read() == b"heard" and of_its_own.wait(10) == of_its_own.poll() == 0
        assert of_this.poll() is None
    finally:
        for one in (of_this, of_its_own):
            one.bury()


def test_a_fork_that_raises_ends_with_1_and_says_why(nursery: Nursery, capfd: pytest.CaptureFixture[str]) -> None:
    child = nursery.fork("test_nursery", "raise")
    child.stdin.close()
    assert child.wait(10) == 1
    child.bury()
    assert "RuntimeError: as it was asked to" in capfd.readouterr().err


def test_a_fork_is_waited_for_until_a_deadline_and_a_signal_is_its_return_code(child: Forked) -> None:
    child.send_signal(signal.SIGSTOP)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.02)
    child.kill()
    assert child.wait(10) == -signal.SIGKILL == child.returncode
    child.kill()  # is too late, and meets nobody else


def test_a_fork_that_nobody_asked_for_keeps_its_process_id(child: Forked) -> None:
    os.kill(child.pid, signal.SIGKILL)
    stat = Path(f"/proc/{child.pid}/stat")
    assert until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")
    assert child.poll() == -signal.SIGKILL and not stat.exists()


def test_all_end_when_whoever_asked_for_them_has_even_those_that_are_frozen() -> None:
    nursery = Nursery()
    children = [nursery.fork("test_nursery") for _ in range(3)]
    children[0].send_signal(signal.SIGSTOP)
    nursery.close()  # the socket ends, and it waits for the nursery
    for one in children:
        assert not Path(f"/proc/{one.pid}").exists()
        one.stdin.close()
        one.stdout.close()
