"""The three ways to deploy on a cluster that runs already: `ray job submit`, `serve run`, `serve deploy`. Each serves real tokens."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

import harness

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
MAX_TOKENS = 12


@dataclass(frozen=True)
class Head:
    """A Ray cluster of one node, with its dashboard, on ports of its own."""

    gcs: str
    dashboard: str
    environ: dict[str, str]

    def run(self, *command: str, timeout_s: float = 240.0) -> str:
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]], cwd=ROOT, env=self.environ, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head --block` as a child of its own process group, so that only this Ray is stopped in the end."""
    temp = tempfile.mkdtemp(prefix="pmx-", dir="/tmp")
    gcs, dashboard = free_port(), free_port()
    environ = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "0",
    }
    flags = ["--head", "--block", "--num-cpus=6", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={temp}"]
    flags += ["--include-dashboard=true", "--object-store-memory=100000000", "--disable-usage-stats"]
    start_environ = {key: value for key, value in environ.items() if key != "RAY_ADDRESS"}
    with (Path(temp) / "start.log").open("w") as log:
        process = subprocess.Popen([str(BIN / "ray"), "start", *flags], env=start_environ, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", 90.0)
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environ)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(temp, ignore_errors=True)


def wait_for(url: str, deadline_s: float) -> None:
    began_s = time.monotonic()
    while time.monotonic() - began_s < deadline_s:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{url} did not answer within {deadline_s} s")


def check_serves(url: str) -> None:
    """It is ready, and two models answer as transformers does."""
    wait_for(f"{url}/ready", 180.0)

    async def ask() -> list[harness.Answer]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return [await harness.chat(client, model, harness.QUESTIONS[0], MAX_TOKENS, stream=True) for model in harness.MODELS[:2]]

    assert harness.wrong_answers(asyncio.run(ask()), MAX_TOKENS) == []


def wait_gone(url: str, deadline_s: float = 60.0) -> None:
    began_s = time.monotonic()
    while time.monotonic() - began_s < deadline_s:
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code != 200:
                return
        except httpx.HTTPError:
            return
        time.sleep(0.5)
    raise AssertionError(f"{url} still serves")


def wait_until_serve_is_gone(head: Head, deadline_s: float = 60.0) -> None:
    """A job that stops takes Serve with it when nothing else was deployed: the next route starts its own."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < deadline_s:
        if not httpx.get(f"{head.dashboard}/api/serve/applications/", timeout=10).json().get("applications"):
            return
        time.sleep(0.5)
    raise AssertionError("Serve applications are left")


def small_config(folder: Path, name: str, port: int) -> Path:
    """Two of the demo models on two workers."""
    models = [{"name": model, "path": str(harness.DEMO / "models" / model), "dtype": "float32"} for model in harness.MODELS[:2]]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "models": models, "serve": {"port": port}}))
    return path


def test_ray_job_submit_serves_until_it_is_stopped(head: Head, tmp_path: Path) -> None:
    port = free_port()
    config = small_config(tmp_path, "job", port)
    submit = ("ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--no-wait", "--submission-id", "polymux-job")
    head.run(*submit, "--", sys.executable, "-m", "polymux.deploy.cli", "serve", "--config", str(config))
    check_serves(f"http://127.0.0.1:{port}")
    logs = head.run("ray", "job", "logs", "--address", head.dashboard, "polymux-job")
    assert f":{port}" in logs, "the job's log says where it serves"
    head.run("ray", "job", "stop", "--address", head.dashboard, "polymux-job")
    wait_gone(f"http://127.0.0.1:{port}")
    wait_until_serve_is_gone(head)


def test_serve_run_takes_an_import_path(head: Head, tmp_path: Path) -> None:
    config = small_config(tmp_path, "run", 8000)
    command = [str(BIN / "serve"), "run", "--working-dir", ".", "--route-prefix", "/", "polymux.deploy.app:build", f"config={config}"]
    with (tmp_path / "run.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=head.environ, stdout=log, stderr=log)
    try:
        check_serves("http://127.0.0.1:8000")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    wait_gone("http://127.0.0.1:8000")


def test_serve_deploy_takes_the_shipped_yaml(head: Head) -> None:
    head.run("serve", "deploy", "--address", head.dashboard, "deploy/serve.yaml")
    url = "http://127.0.0.1:8000"
    check_serves(url)
    head.run("serve", "shutdown", "--address", head.dashboard, "-y")
    wait_gone(url)
