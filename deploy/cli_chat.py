"""Talking to a server from a terminal: `polymux chat`, `polymux complete`, `polymux models`. Needs only the client SDK."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from polymux.deploy.client import Client, Stream
from polymux.transport.errors import InvalidRequest, ModelNotFound, PolymuxError

HELP = (
    "/model NAME changes the model, /models lists them, /system TEXT sets the system message, /clear forgets the conversation, /exit ends"
)


def first_model(client: Client, wanted: str | None) -> str:
    """The model asked for, else the first that the server lists. Raises ModelNotFound when it lists none."""
    if wanted:
        return wanted
    models = client.models()
    if not models:
        raise ModelNotFound("the server has no models; start it with --model NAME=PATH")
    return models[0].id


def show_models(client: Client, console: Console, *, is_json: bool) -> None:
    models = client.models()
    if is_json:
        console.print_json(json.dumps([model.model_dump() for model in models]))
        return
    states = {one["model"]: one for one in client.topology().get("models", ())}
    table = Table()
    for name in ("model", "context", "state", "on workers"):
        table.add_column(name)
    for model in models:
        state: Mapping[str, Any] = states.get(model.id, {})
        table.add_row(model.id, str(model.max_model_len or "-"), state.get("state", "-"), " ".join(state.get("resident_on", ())) or "-")
    console.print(table)


def say(stream: Stream, console: Console) -> str:
    """Print a stream's text as it comes; Ctrl-C ends it at the server. Returns what was said."""
    try:
        with stream:
            for chunk in stream:
                console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    console.print()
    return stream.text


def chat_once(client: Client, model: str | None, text: str, system: str | None, params: Mapping[str, Any], console: Console) -> None:
    model = first_model(client, model)
    say(client.stream_chat(model, [*_messages(system), {"role": "user", "content": text}], **params), console)


def complete_once(client: Client, model: str | None, prompt: str, params: Mapping[str, Any], console: Console) -> None:
    if not prompt:
        raise InvalidRequest("there is no prompt; give it as an argument or on standard input", param="prompt")
    say(client.stream_complete(first_model(client, model), prompt, **params), console)


def read_input(argument: str | None) -> str | None:
    """The argument, else standard input when it is piped in, else None: a person is at the terminal."""
    if argument is not None and argument != "-":
        return argument
    return sys.stdin.read() if argument == "-" or not sys.stdin.isatty() else None


class Conversation:
    """The interactive chat: lines in, streams out, until the end of input."""

    def __init__(self, client: Client, model: str | None, system: str | None, params: Mapping[str, Any], console: Console) -> None:
        self._client = client
        self._console = console
        self._params = dict(params)
        self.model = first_model(client, model)
        self.messages = _messages(system)

    def run(self) -> None:
        import readline  # noqa: F401 - gives input() a history and arrow keys

        self._console.print(f"[bold]{self.model}[/]; {HELP}", style="dim")
        while True:
            try:
                line = self._console.input("[bold green]>[/] ").strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print("(/exit or Ctrl-D to leave)", style="dim")
                continue
            if line in ("/exit", "/quit"):
                return
            if line:
                self._try(line)

    def _try(self, line: str) -> None:
        """An error ends the answer, not the conversation."""
        try:
            self.take(line)
        except PolymuxError as error:
            self._console.print(str(error), style="red", markup=False, highlight=False)

    def take(self, line: str) -> None:
        """One line: a command, or a message to answer."""
        command, _, rest = line.partition(" ")
        if command == "/help":
            self._console.print(HELP, style="dim")
        elif command == "/clear":
            self.messages = self.messages[:1] if self.messages[:1] and self.messages[0]["role"] == "system" else []
        elif command == "/system":
            self.messages = _messages(rest.strip() or None)
        elif command == "/models":
            show_models(self._client, self._console, is_json=False)
        elif command == "/model" and rest.strip():
            self.model = rest.strip()
        elif line.startswith("/"):
            self._console.print(f"{command} is not a command; {HELP}", style="yellow", markup=False)
        else:
            self._answer(line)

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        stream = self._client.stream_chat(self.model, self.messages, **self._params)
        try:
            answer = say(stream, self._console)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        if stream.ttft_s is not None and stream.usage is not None:
            rate = f", {1 / stream.tpot_s:.0f} tokens/s" if stream.tpot_s else ""
            self._console.print(f"{stream.usage.completion_tokens} tokens, first after {stream.ttft_s:.2f} s{rate}", style="dim")


def _messages(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []
