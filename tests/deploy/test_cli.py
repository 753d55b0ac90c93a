"""The command line: what clients see of a real front door on a real socket, how flags become a configuration, what signals do."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from zero_stack import ZeroStack, serving

import polymux
from polymux.cluster.config import ClusterConfig
from polymux.deploy import cli
from polymux.deploy.cli_chat import Conversation
from polymux.deploy.cli_config import ServeFlags, configuration, named_model
from polymux.deploy.client import Client
from polymux.deploy.http.auth import hash_key
from polymux.transport.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody serves HTTP there


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def polymux_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process, without the environment's settings; what it sets up of its process is undone."""
    for name in [name for name in os.environ if name.startswith(("POLYMUX_", "RAY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)

    def run(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def url(stack: ZeroStack) -> Iterator[str]:
    """A server whose model `bytes` answers with the prompt that it was sent."""
    with serving(stack.app) as url:
        yield url


# -- clients ------------------------------------------------------------------------------------------------------------------------


def test_the_timeline_is_written_in_the_form_that_its_name_says(polymux_cli: Callable[..., Outcome], url: str, tmp_path: Path) -> None:
    page, data = tmp_path / "line.html", tmp_path / "line.json"
    written = polymux_cli("timeline", "--out", str(page), "--base-url", url)
    assert written.code == 0 and written.out == f"0 spans of 0 workers written to {page}\n"
    assert page.read_text().startswith("<!doctype html>")
    assert polymux_cli("timeline", "-o", str(data), "--chrome", "--base-url", url).code == 0
    assert json.loads(data.read_text())["traceEvents"] == []
    assert polymux_cli("timeline", "-o", str(tmp_path / "line.svg"), "--base-url", url).code == 2


def test_a_worker_is_drained_by_its_name(polymux_cli: Callable[..., Outcome], url: str) -> None:
    done = polymux_cli("drain", "decode-0", "--base-url", url)
    assert (done.code, done.out) == (0, "worker decode-0 is empty and has stopped\n")
    unknown = polymux_cli("drain", "decode-9", "--base-url", url)
    assert unknown.code == 2 and "decode-9" in unknown.err


def test_version_is_that_of_the_package(polymux_cli: Callable[..., Outcome]) -> None:
    assert polymux_cli("version").out == f"polymux {polymux.__version__}\n"


def test_chat_answers_a_message_with_the_first_model(polymux_cli: Callable[..., Outcome], url: str) -> None:
    done = polymux_cli("chat", "[bold]hi[/]", "--base-url", url)
    assert (done.code, done.out, done.err) == (0, "user: [bold]hi[/]\nassistant: \n", "")


def test_chat_reads_a_pipe_and_takes_a_system_message(polymux_cli: Callable[..., Outcome], url: str) -> None:
    done = polymux_cli("chat", "--system", "be brief", "-m", "bytes", "--base-url", url, stdin="from a pipe")
    assert done.out == "system: be brief\nuser: from a pipe\nassistant: \n"


def test_complete_continues_a_text_up_to_max_tokens(polymux_cli: Callable[..., Outcome], url: str) -> None:
    assert polymux_cli("complete", "one two three", "--max-tokens", "7", "--base-url", url).out == "one two\n"
    assert polymux_cli("complete", "--base-url", url).code == 2


def test_models_are_listed_for_people_and_for_programs(polymux_cli: Callable[..., Outcome], url: str) -> None:
    assert "bytes" in polymux_cli("models", "--base-url", url).out
    listed = json.loads(polymux_cli("models", "--json", "--base-url", url).out)
    assert [model["id"] for model in listed] == ["bytes"]


def test_the_servers_address_and_key_may_come_from_the_environment(
    polymux_cli: Callable[..., Outcome], make_stack: Callable[..., ZeroStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_stack(http_settings={"api_keys": (hash_key("a-good-key"),)}).app) as url:
        monkeypatch.setenv("POLYMUX_BASE_URL", url)
        refused = polymux_cli("chat", "hi", "--api-key", "a-bad-key")
        assert refused.code == 1 and "POLYMUX_API_KEY" in refused.err
        monkeypatch.setenv("POLYMUX_API_KEY", "a-good-key")
        assert polymux_cli("chat", "hi").out == "user: hi\nassistant: \n"


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (("chat", "hi", "--base-url", NOWHERE), 1, "polymux serve"),
        (("models", "--base-url", "nonsense"), 2, "http://"),
        (("serve",), 2, "--model NAME=PATH"),
        (("serve", "--model", "=x"), 2, "NAME=PATH"),
        (("serve", "--config", "/nowhere.yaml"), 2, "/nowhere.yaml"),
        (("serve", "--model", "a=b", "--set", "engine.max_seqs=3"), 2, "engine.max_num_seqs"),
        (("serve", "--model", "a=b", "--dtype", "int3"), 2, "models[0].dtype"),
        (("serve", "--model", "a=/nowhere", "--log-level", "ERROR"), 2, "/nowhere"),
        (("serve", "--model", "a=b", "--address", "127.0.0.1:9", "--log-level", "ERROR"), 1, "ray start --head"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_an_error_is_one_line_that_names_the_fix(
    polymux_cli: Callable[..., Outcome], arguments: tuple[str, ...], code: int, names: str
) -> None:
    done = polymux_cli(*arguments)
    assert done.code == code
    assert done.err.count("\n") == 1 and done.err.startswith("polymux: ") and names in done.err
    assert done.out == ""


def test_debugging_shows_where_an_error_comes_from(polymux_cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMUX_LOG_LEVEL", "INFO")  # restored after the command has set it
    assert "Traceback" in polymux_cli("--log-level", "DEBUG", "models", "--base-url", NOWHERE).err


def test_an_unknown_model_is_wrong_usage(polymux_cli: Callable[..., Outcome], url: str) -> None:
    done = polymux_cli("chat", "hi", "-m", "nope", "--base-url", url)
    assert done.code == 2 and "'nope'" in done.err


def test_client_commands_need_no_server_parts() -> None:
    blocked = ("torch", "ray", "numpy", "msgpack", "starlette", "yaml", "tokenizers", "safetensors", "prometheus_client", "jinja2")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from polymux.deploy.cli import main\n"
    for arguments, words in ((["version"], "polymux "), (["chat", "x"], "cannot be reached"), (["serve", "-m", "a=b"], "polymux[serve]")):
        environ = {"PATH": os.environ["PATH"], "POLYMUX_BASE_URL": NOWHERE}
        done = subprocess.run(
            [sys.executable, "-c", f"{code}sys.exit(main({arguments!r}))"],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert words in done.stdout + done.stderr and "Traceback" not in done.stderr


# -- a conversation -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def conversation(url: str) -> Iterator[Conversation]:
    with Client(url) as client:
        yield Conversation(client, None, None, {}, Console(file=io.StringIO(), width=200))


def said(conversation: Conversation) -> str:
    file: Any = conversation._console.file
    return str(file.getvalue())


def test_a_conversation_remembers_what_was_said(conversation: Conversation) -> None:
    conversation.take("hello")
    conversation.take("again")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert "user: again" in conversation.messages[3]["content"] and "user: hello" in conversation.messages[3]["content"]
    assert "tokens, first after" in said(conversation)


def test_commands_change_a_conversation_and_are_not_sent(conversation: Conversation) -> None:
    conversation.take("/system be kind")
    conversation.take("hello")
    conversation.take("/clear")
    assert conversation.messages == [{"role": "system", "content": "be kind"}]
    conversation.take("/model other")
    assert conversation.model == "other"
    conversation.take("/nonsense")
    assert "/nonsense is not a command" in said(conversation)
    conversation.take("/models")
    assert "bytes" in said(conversation)


def test_a_message_that_failed_is_forgotten_and_the_conversation_goes_on(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["/model other", "hello", "", "/model bytes", "again"])

    def next_line(*_: Any) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(conversation._console, "input", next_line)
    conversation.run()
    assert "model 'other' is not registered" in said(conversation)
    assert [message["content"] for message in conversation.messages] == ["again", "user: again\nassistant: "]


# -- flags --------------------------------------------------------------------------------------------------------------------------


def test_flags_outrank_the_environment_which_outranks_the_file(tmp_path: Path) -> None:
    file = tmp_path / "polymux.yaml"
    file.write_text("log_level: WARNING\nserve: {port: 1}\nengine: {max_num_seqs: 1}\nmodels: [{name: a, path: /a}]\n")
    environ = {"POLYMUX_CONFIG": str(file), "POLYMUX_LOG_LEVEL": "ERROR", "POLYMUX_API_KEY": "from-the-environment"}
    config = configuration(ServeFlags(port=2, settings=("engine.max_num_seqs=3", "serve.port=9")), environ)
    assert (config.log_level, config.serve.port, config.engine.max_num_seqs) == ("ERROR", 2, 3)
    assert config.security.accepts("from-the-environment") and not config.security.accepts(None)
    assert configuration(ServeFlags(api_keys=("from-the-flag",)), environ).security.accepts("from-the-flag")


def test_models_of_the_command_line_join_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "polymux.yaml"
    file.write_text("models: [{name: a, path: /a, ttft_slo_s: 1s}, {name: b, path: /b}]\n")
    flags = ServeFlags(config=file, models=("a=/other", f"{tmp_path}"), dtype="float32", max_model_len=128)
    models = configuration(flags, {}).models
    assert [(model.name, model.path) for model in models] == [("a", "/other"), ("b", "/b"), (tmp_path.name, str(tmp_path))]
    assert models[0].ttft_slo_s == 1.0
    assert {(model.dtype, model.max_model_len) for model in models} == {("float32", 128)}


def test_a_model_may_be_named_by_its_hub_id() -> None:
    assert named_model("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")
    assert named_model("chat=Qwen/Qwen3-0.6B") == ("chat", "Qwen/Qwen3-0.6B")


def test_config_shows_what_comes_of_it_and_no_secret(polymux_cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMUX_API_KEY", "a-secret-key")
    shown = polymux_cli("config", "--model", "a=/a", "--set", "pools.decode.workers=3").out
    assert "workers: 3" in shown and "a-secret-key" not in shown and "sha256" not in shown


# -- serving, as far as it goes without Ray -----------------------------------------------------------------------------------------


def test_a_taken_port_is_found_before_anything_starts() -> None:
    from polymux.deploy.cli_serve import with_free_port

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"serve.port={port}"):
            with_free_port(ClusterConfig.from_dict({"serve": {"port": port}}))
    assert with_free_port(ClusterConfig.from_dict({"serve": {"port": 0}})).serve.port > 0


def test_the_first_signal_ends_the_wait_and_the_second_the_drain() -> None:
    from polymux.deploy.cli_serve import Interrupted, Signals

    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert not signals.wait(0.0)
        assert signals.wait(5.0) and signals.name == "SIGTERM"
        with pytest.raises(Interrupted) as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_interrupts_a_start() -> None:
    from polymux.deploy.cli_serve import Interrupted, Signals

    with Signals(), pytest.raises(Interrupted) as interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupted.value.exit_code == 143
