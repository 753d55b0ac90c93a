"""The `polymux` command. Client commands need the SDK alone; what serves is imported by the commands that serve.

Errors are one line that names the fix, on standard error; `--log-level DEBUG` shows where they come from. Exit codes: 0 done, 1 failed,
2 wrong usage or configuration, 130 and 143 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import polymux
from polymux.deploy.ray_token import ensure_token
from polymux.transport.errors import AuthenticationFailed, CheckpointError, ConfigError, InvalidRequest, PeerLost, PolymuxError

app = typer.Typer(
    name="polymux",
    help="Many language models, one small pool of workers: prefill and decode disaggregated, multiplexed token by token, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)

BaseUrl = Annotated[str | None, typer.Option(help="the server; default POLYMUX_BASE_URL, else http://127.0.0.1:8000", show_default=False)]
ApiKey = Annotated[str | None, typer.Option(help="key to present; default POLYMUX_API_KEY", show_default=False)]
ModelName = Annotated[str | None, typer.Option("--model", "-m", help="default: the first that the server lists", show_default=False)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the model's", show_default=False)]
MaxTokens = Annotated[int | None, typer.Option(help="tokens to make, at most", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="makes the answer repeatable", show_default=False)]
Slo = Annotated[str | None, typer.Option(help="interactive or batch: how soon tokens are wanted; default: the model's", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]
LogLevel = Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR", show_default=False)]


HINTS: dict[type[PolymuxError], str] = {
    PeerLost: "; is a server running? Start one with `polymux serve`, or name it with --base-url",
    AuthenticationFailed: "; give --api-key or POLYMUX_API_KEY",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Ends in SystemExit where typer does; returns the code of an error of ours."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=arguments, prog_name="polymux")
    except KeyboardInterrupt as error:
        return int(getattr(error, "exit_code", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has enough
        return 0
    except Exception as error:
        return _explain(error, is_debug=_is_debug(arguments))
    return 0


def _is_debug(arguments: Sequence[str]) -> bool:
    words = " ".join(arguments).replace("=", " ").upper()
    return "--LOG-LEVEL DEBUG" in words or os.environ.get("POLYMUX_LOG_LEVEL", "").upper() == "DEBUG"


def _explain(error: Exception, *, is_debug: bool) -> int:
    """One line: what is wrong, and what would be right."""
    if is_debug:
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("polymux"):
        err.print(f"polymux: {error.name} is not installed; pip install 'polymux[serve]' brings all that serving needs", markup=False)
        return 1
    if not isinstance(error, PolymuxError):
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = "" if is_debug else "; --log-level DEBUG shows where it comes from"
        err.print(f"polymux: {text}{hint}", markup=False, soft_wrap=True)
        return 1
    err.print(f"polymux: {error}{HINTS.get(type(error), '')}", markup=False, highlight=False, soft_wrap=True)
    return 2 if isinstance(error, ConfigError | CheckpointError | InvalidRequest) else 1


@app.callback()
def common(log_level: LogLevel = None) -> None:
    if log_level:
        os.environ["POLYMUX_LOG_LEVEL"] = log_level.upper()


# -- clients ------------------------------------------------------------------------------------------------------------------------


@app.command()
def chat(
    message: Annotated[
        str | None, typer.Argument(help="what to say; - or a pipe reads standard input; nothing begins a conversation")
    ] = None,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="the system message", show_default=False)] = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    slo: Slo = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model: one answer, or a conversation."""
    from polymux.deploy.cli_chat import Conversation, chat_once, read_input
    from polymux.deploy.client import Client

    params = _params(temperature=temperature, max_tokens=max_tokens, seed=seed, slo=slo)
    text = read_input(message)
    with Client(base_url, api_key) as client:
        if text is None:
            Conversation(client, model, system, params, out).run()
        else:
            chat_once(client, model, text, system, params, out)


@app.command()
def complete(
    prompt: Annotated[str | None, typer.Argument(help="how the text begins; - or a pipe reads standard input")] = None,
    model: ModelName = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = 128,
    seed: Seed = None,
    slo: Slo = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Continue a text."""
    from polymux.deploy.cli_chat import complete_once, read_input
    from polymux.deploy.client import Client

    params = _params(temperature=temperature, max_tokens=max_tokens, seed=seed, slo=slo)
    with Client(base_url, api_key) as client:
        complete_once(client, model, read_input(prompt) or "", params, out)


@app.command()
def models(base_url: BaseUrl = None, api_key: ApiKey = None, is_json: AsJson = False) -> None:
    """List the models that a server has, and where they are."""
    from polymux.deploy.cli_chat import show_models
    from polymux.deploy.client import Client

    with Client(base_url, api_key) as client:
        show_models(client, out, is_json=is_json)


@app.command()
def timeline(
    out_file: Annotated[Path, typer.Option("--out", "-o", help="file to write; .html is a page, .json data")] = Path(
        "polymux-timeline.html"
    ),
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help="how far to look back")] = 300.0,
    limit: Annotated[int, typer.Option(min=1, max=65_536, help="spans of each worker, the newest, at most")] = 16_384,
    is_chrome: Annotated[bool, typer.Option("--chrome", help="write the trace event format, which ui.perfetto.dev reads")] = False,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Write down what every worker did in the last minutes: switches, prefill, decode and KV transfers, in lanes on one clock."""
    from polymux.deploy.client import Client
    from polymux.deploy.timeline.write import write

    with Client(base_url, api_key) as client:
        found = write(client.timeline(seconds, limit), out_file, is_chrome=is_chrome)
    out.print(f"{found} written to {out_file}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="its id, such as decode-1; /v1/polymux/topology lists them")],
    timeout: Annotated[float, typer.Option(min=0.1, max=600.0, help="seconds for its sequences to move or end")] = 60.0,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Empty a worker, then stop it: what it runs goes on elsewhere, and no client notices."""
    from polymux.deploy.client import Client

    with Client(base_url, api_key) as client:
        client.drain(worker, timeout)
    out.print(f"worker {worker} is empty and has stopped", markup=False, highlight=False)


@app.command()
def version() -> None:
    """The version of this installation."""
    out.print(f"polymux {polymux.__version__}", highlight=False)


def _params(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


# -- servers ------------------------------------------------------------------------------------------------------------------------

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="a YAML file; flags outrank it. Default: POLYMUX_CONFIG", show_default=False)
]
Models = Annotated[
    list[str] | None, typer.Option("--model", "-m", metavar="NAME=PATH", help="a checkpoint to serve; repeat for more", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="any setting, such as engine.max_num_seqs=8; repeat", show_default=False),
]


@app.command()
def serve(
    config: ConfigFile = None,
    model: Models = None,
    prefill_workers: Annotated[int | None, typer.Option(help="workers that compute prompts", show_default=False)] = None,
    decode_workers: Annotated[int | None, typer.Option(help="workers that make the tokens after the first", show_default=False)] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; 0.0.0.0 for all. Default: 127.0.0.1", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on; 0 picks a free one. Default: 8000", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="of every model: auto, float32, bfloat16 or float16", show_default=False)] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens of prompt and output, at most", show_default=False)] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="sequences in one decode batch", show_default=False)] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="token budget of one prefill step", show_default=False)] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="key that clients must present; repeat for more", show_default=False)] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; default RAY_ADDRESS, else an own one", show_default=False)
    ] = None,
    settings: Settings = None,
    log_level: LogLevel = None,
) -> None:
    """Serve models over HTTP until SIGINT or SIGTERM, then finish what is open and stop."""
    from polymux.deploy import cli_config

    flags = cli_config.ServeFlags(
        config=config,
        models=model or (),
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        host=host,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        api_keys=api_key or (),
        log_level=log_level.upper() if log_level else None,
        settings=settings or (),
    )
    checked = cli_config.configuration(flags, os.environ)
    address = address or os.environ.get("RAY_ADDRESS") or None  # set inside a Ray job
    if address is None:
        ensure_token(os.environ)
    from polymux.deploy.cli_serve import serve as run

    run(checked, address=address)


@app.command()
def demo(
    requests: Annotated[int, typer.Option(min=1, help="how many")] = 48,
    seconds: Annotated[float, typer.Option(min=0.0, help="in which they arrive")] = 10.0,
    seed: Annotated[int, typer.Option(help="of their order and times")] = 0,
    check: Annotated[bool, typer.Option("--check", help="compare every answer with transformers' (needs polymux[bench])")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the summary there", show_default=False)] = None,
) -> None:
    """Serve four small models that come with polymux on three workers, ask them all at once, and watch."""
    ensure_token(os.environ)
    from polymux.deploy.demo.run import DemoOptions, run

    options = DemoOptions(num_requests=requests, seconds=seconds, seed=seed, is_checked=check, json_path=json_file)
    raise typer.Exit(run(options, out))


@app.command()
def config(config: ConfigFile = None, model: Models = None, settings: Settings = None) -> None:
    """Check a configuration and show what comes of it, secrets hidden."""
    import yaml

    from polymux.deploy.cli_config import ServeFlags, configuration

    checked = configuration(ServeFlags(config=config, models=model or (), settings=settings or ()), os.environ)
    print(yaml.safe_dump(checked.to_dict(), sort_keys=False), end="")  # noqa: T201 - as it is, for a file


@app.command()
def doctor(
    config: ConfigFile = None,
    settings: Settings = None,
    host: Annotated[str | None, typer.Option(help="address that serving would listen on", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="port that serving would listen on", show_default=False)] = None,
    is_json: AsJson = False,
) -> None:
    """Name what this machine lacks for serving, or has too little of, and the fix for each; and what workers would compute on, and why."""
    from polymux.deploy.cli_doctor import show
    from polymux.deploy.doctor import examine

    raise typer.Exit(show(examine(os.environ, config=config, settings=settings or (), host=host, port=port), out, is_json=is_json))


# -- studies, without a cluster -----------------------------------------------------------------------------------------------------

TraceSource = Annotated[str, typer.Option("--trace", help="a CSV or JSONL file, or a generator: poisson:models=64,rate=0.1,seconds=120")]
Cluster = Annotated[Path | None, typer.Option("--cluster", help="YAML: devices, costs, device, ...", show_default=False)]
SimSlo = Annotated[str, typer.Option("--slo", help="seconds to the first token, and for each one after it")]
NumModels = Annotated[int, typer.Option("--models", min=1, help="over which a trace is spread that names none")]
Zipf = Annotated[float, typer.Option(min=0.0, help="their popularity is rank ** -zipf")]
Limit = Annotated[int | None, typer.Option(min=1, help="requests to take of the trace", show_default=False)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the result there", show_default=False)]


@app.command()
def simulate(
    trace: Annotated[list[str], typer.Option("--trace", help="as of plan; repeat for several loads")],
    cluster: Cluster = None,
    policy: Annotated[list[str] | None, typer.Option("--policy", help="with commas for several; default: slack,wrr,sllm,sllm-idle")] = None,
    slo: SimSlo = "ttft=10,tpot=0.1",
    speed: Annotated[list[float] | None, typer.Option(help="arrivals come so many times as fast; repeat for several")] = None,
    models: NumModels = 16,
    zipf: Zipf = 1.0,
    seed: Annotated[int, typer.Option(help="of what a trace leaves open")] = 0,
    limit: Limit = None,
    json_file: JsonFile = None,
    plots: Annotated[Path | None, typer.Option(help="draw pictures into this folder (needs matplotlib)", show_default=False)] = None,
) -> None:
    """Serve a trace in simulation, by several policies: attainment, TTFT and TPOT of each, and what no scheduler could exceed."""
    from polymux.deploy import cli_simulate

    options = cli_simulate.SimulateOptions(
        traces=tuple(trace),
        cluster=cluster,
        policies=tuple(name for text in policy for name in text.split(",")) if policy else cli_simulate.DEFAULT_POLICIES,
        slo=slo,
        speeds=tuple(speed or (1.0,)),
        models=models,
        zipf=zipf,
        seed=seed,
        limit=limit,
        json_path=json_file,
        plots_path=plots,
    )
    raise typer.Exit(cli_simulate.simulate(options, out))


@app.command()
def plan(
    trace: TraceSource,
    gpu: Annotated[str, typer.Option(help="kinds of device with prices: h100:2.5/h,h200:3.5/h")] = "h100:2.5/h",
    cluster: Cluster = None,
    slo: SimSlo = "ttft=10,tpot=0.1",
    measure: Annotated[str, typer.Option(help="of attainment: req, tok or qos")] = "req",
    share: Annotated[float, typer.Option(help="of it that is wanted")] = 0.9,
    max_devices: Annotated[int, typer.Option(min=1, help="to try")] = 512,
    models: NumModels = 16,
    zipf: Zipf = 1.0,
    seed: Annotated[int, typer.Option(help="of what a trace leaves open")] = 0,
    limit: Limit = None,
    json_file: JsonFile = None,
) -> None:
    """How many GPUs a catalogue needs, and at what cost: one a model, switching between requests, or polymux.

    The trace `production` has the statistics that Aegaeon (SOSP '25) reports of its pool: 100 models, 0.037 requests/s each, 16.8 s long.
    """
    from polymux.deploy import cli_simulate

    options = cli_simulate.PlanOptions(
        trace=trace,
        gpu=gpu,
        cluster=cluster,
        slo=slo,
        measure=measure,
        share=share,
        max_devices=max_devices,
        models=models,
        zipf=zipf,
        seed=seed,
        limit=limit,
        json_path=json_file,
    )
    raise typer.Exit(cli_simulate.plan_cluster(options, out))


if __name__ == "__main__":
    sys.exit(main())
