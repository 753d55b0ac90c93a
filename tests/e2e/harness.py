"""What the end-to-end tests share: the demo models, transformers as the reference, a mixed load, and a look at a process."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo"
MODELS = ("llama-small", "llama-large", "qwen3-small", "qwen3-large")
QUESTIONS = (
    "What does os.path.join do?",
    "Explain str.split",
    "Describe the for statement",
    "What does dict.get do?",
    "Explain list.append",
    "What does open do?",
    "Describe the try statement",
    "Explain json.dumps",
)


@functools.cache
def _reference(model: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(DEMO / "models" / model)
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@functools.cache
def greedy_answer(model: str, question: str, max_tokens: int) -> str:
    """What transformers answers in fp32: greedy, on the same checkpoint, with the checkpoint's chat template."""
    import torch

    tokenizer, network = _reference(model)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        output = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@dataclass
class Answer:
    """One chat answer as a client saw it."""

    model: str
    question: str
    text: str = ""
    finish_reason: str | None = None
    is_complete: bool = False
    usage: dict[str, Any] = field(default_factory=dict)


async def chat(client: httpx.AsyncClient, model: str, question: str, max_tokens: int, *, stream: bool) -> Answer:
    """Ask greedily, streaming or not. Raises for anything but a 200."""
    answer = Answer(model, question)
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    if not stream:
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        answer.text, answer.finish_reason, answer.usage = choice["message"]["content"], choice["finish_reason"], response.json()["usage"]
        answer.is_complete = True
        return answer
    body["stream_options"] = {"include_usage": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.is_complete = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    answer.text += choice["delta"].get("content") or ""
                    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                answer.usage = event.get("usage") or answer.usage
    return answer


async def mixed_load(
    url: str, count: int, max_tokens: int, *, models: Sequence[str] = MODELS, headers: dict[str, str] | None = None
) -> list[Answer]:
    """`count` requests at once over these models, every third not streamed."""
    limits = httpx.Limits(max_connections=count + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers) as client:
        tasks = [
            chat(client, models[i % len(models)], QUESTIONS[i // len(models) % len(QUESTIONS)], max_tokens, stream=i % 3 > 0)
            for i in range(count)
        ]
        return list(await asyncio.gather(*tasks))


def wrong_answers(answers: Sequence[Answer], max_tokens: int) -> list[str]:
    """Those that are incomplete or differ from transformers, told apart for the test's message."""
    wrong = []
    for answer in answers:
        expected = greedy_answer(answer.model, answer.question, max_tokens)
        if not answer.is_complete or answer.text != expected:
            wrong.append(f"{answer.model} {answer.question!r}: {answer.text!r} is not {expected!r}")
    return wrong


async def topology(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        response = await client.get("/v1/polymux/topology")
        assert response.status_code == 200, response.text
        return dict(response.json())


async def wait_idle(url: str, deadline_s: float = 10.0) -> dict[str, Any]:
    """The topology once no block is out; fails when that takes longer than the deadline."""
    async with asyncio.timeout(deadline_s):
        while True:
            seen = await topology(url)
            if seen["stats"]["num_blocks_out"] == 0 and seen["stats"]["num_inflight"] == 0:
                return seen
            await asyncio.sleep(0.2)


async def wait_counted(url: str, name: str, at_least: float, deadline_s: float = 10.0) -> dict[str, float]:
    """All counters once this one is so far: they come with the workers' reports, later than what they count."""
    async with asyncio.timeout(deadline_s):
        while (counters := (await wait_idle(url))["stats"]["counters"]).get(name, 0.0) < at_least:
            await asyncio.sleep(0.2)
        return dict(counters)


@contextmanager
def uvicorn_server(app: Any) -> Iterator[str]:
    """Serve an ASGI app on a free loopback port in a thread of its own; yields the base URL."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(500):
        if server.started:
            break
        threading.Event().wait(0.02)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(15)


def peak_memory_bytes(pid: int) -> int:
    """The most resident memory that a process ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmHWM of {pid}")


def resident_memory_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> list[str]:
    """What each descriptor of a process leads to."""
    targets = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            targets.append(str(descriptor.readlink()))
    return targets


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
