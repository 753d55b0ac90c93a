"""A front door over zero-cost workers in one process, and a checkpoint directory that holds no model: a tokenizer of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import uvicorn
from starlette.types import ASGIApp
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from zero_engine import TOKEN, ZeroControl, ZeroWorker, zero_spec

from polymux.actors.token_pieces import ALPHABET
from polymux.deploy.http.api import build_asgi
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.settings import FrontDoorSettings, HttpSettings
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ClientId

BOS, EOS = 256, 257
VOCAB_SIZE = 258
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def write_checkpoint(path: Path, generation_config: dict[str, Any] | None = None) -> Path:
    """Token id = byte; ids 256 and 257 begin and end a text. Nothing is added to a prompt."""
    path.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (path / "generation_config.json").write_text(json.dumps(generation_config))
    return path


def byte_spec(model: str, path: Path, max_model_len: int = 1024) -> ModelSpec:
    return zero_spec(model, path, vocab_size=VOCAB_SIZE, max_model_len=max_model_len, eos=(EOS,))


@dataclass(eq=False)
class ZeroStack:
    """`start` begins the workers; the application's lifespan begins the front door. `stop` when the application is closed."""

    specs: tuple[ModelSpec, ...]
    num_workers: int = 1
    step_s: float = 0.0
    frontdoor_settings: dict[str, Any] = field(default_factory=dict)
    http_settings: dict[str, Any] = field(default_factory=dict)
    workers: list[ZeroWorker] = field(default_factory=list)

    def start(self) -> ZeroStack:
        neighbours: dict[str, ZeroWorker] = {}
        self.workers = [
            ZeroWorker(name=str(i), eos=EOS, step_s=self.step_s, neighbours=neighbours).start() for i in range(self.num_workers)
        ]
        self.control = ZeroControl(self.specs, [(one.prefill, one.decode) for one in self.workers])
        settings = {"client_id": ClientId("front-0"), "token": TOKEN, "drain_timeout_s": 5.0, **self.frontdoor_settings}
        self.frontdoor = FrontDoor(FrontDoorSettings(**settings), self.control)
        self.app = build_asgi(self.frontdoor, HttpSettings(**self.http_settings))
        return self

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    @property
    def num_running(self) -> int:
        return sum(worker.num_running for worker in self.workers)


@contextlib.contextmanager
def serving(app: ASGIApp, **options: Any) -> Iterator[str]:
    """uvicorn in a thread of its own, on a free port; its base URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), name="uvicorn", daemon=True)
    thread.start()
    until_s = time.monotonic() + 10.0
    while not server.started:
        if time.monotonic() > until_s or not thread.is_alive():
            raise RuntimeError("uvicorn did not start within 10 s")
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(15.0)
