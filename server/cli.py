"""The `turnout` command. A subcommand imports what it runs, so that --help loads no torch."""

import logging
import math
import os
import sqlite3
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from typer.core import TyperGroup

from server import adapters_cli, bench_cli, promote_cli, training_cli
from server.api.auth import Scope, new_key, parse_keys
from server.cli_options import (
    Base,
    BaseName,
    Device,
    Quantize,
    StorePath,
    adapter_config,
    base_config,
)
from server.config import (
    CacheConfig,
    Config,
    Dtype,
    Policy,
    PromotionConfig,
    PromotionDevice,
    SchedulerConfig,
    ServerConfig,
)

GIB = 1 << 30
# What --help lists, from serving by way of making adapters to measuring.
ORDER = (
    *("serve", "doctor", "keys", "adapters"),
    *("train", "merge", "quantize", "promote", "demote", "candidates"),
    *("loadtest", "bench"),
)
# Options that a command reads itself.
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


class _InOrder(TyperGroup):
    """A group whose commands are listed in `ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    help="Serve many LoRA adapters over one quantized Mistral base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut long options off at 80 columns
)
keys = typer.Typer(help="Make API keys.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(adapters_cli.app, name="adapters")
app.add_typer(bench_cli.app, name="bench")
app.add_typer(keys, name="keys")
app.command(context_settings=PASSED_ON)(training_cli.train)
for command in (
    *(training_cli.merge, training_cli.quantize),
    *(promote_cli.promote, promote_cli.demote, promote_cli.candidates),
):
    app.command()(command)

BankRows = Annotated[int, typer.Option(help="Rank rows of resident adapters.")]
KvGib = Annotated[float, typer.Option(min=0, help="KV cache on a machine without a GPU.")]


@app.command()
def serve(
    base: Base = None,
    base_name: BaseName = None,
    quantization: Quantize = "nf4",
    dtype: Annotated[Dtype, typer.Option(help="Of activations and KV.")] = "auto",
    device: Device = "auto",
    max_model_len: Annotated[int, typer.Option(help="Tokens; 0: the base's own limit.")] = 0,
    host: Annotated[str, typer.Option(help="Beyond loopback, --api-keys is needed.")] = "127.0.0.1",
    port: int = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="File that `keys new` writes.")] = None,
    store: StorePath = None,
    allowed_root: Annotated[
        list[Path] | None, typer.Option(help="A folder that lora_path may name; repeatable.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option(help="Take adapters whose config names another base.")
    ] = False,
    bank_rows: BankRows = 512,
    max_rank: Annotated[int, typer.Option(help="Of any adapter.")] = 256,
    host_gib: Annotated[float, typer.Option(min=0, help="Host memory for adapters.")] = 1.0,
    kv_gib: KvGib = 1.0,
    kv_fraction: Annotated[float, typer.Option(help="KV's share of free GPU memory.")] = 0.9,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse KV of equal prompts.")] = True,
    max_running: Annotated[int, typer.Option(help="Requests in one step.")] = 64,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens in one step; 0: by device.")] = 0,
    max_prefill_tokens: Annotated[
        int, typer.Option(help="The same where nobody decodes; 0: by device.")
    ] = 0,
    token_fair: Annotated[bool, typer.Option(help="Between adapters.")] = True,
    max_waiting: Annotated[int, typer.Option(help="Requests under way; past it: 503.")] = 256,
    max_waiting_per_tenant: Annotated[int, typer.Option(help="Past it: 429.")] = 128,
    drain_s: Annotated[float, typer.Option(help="Grace for streams at SIGTERM.")] = 30.0,
    engine_silence_s: Annotated[
        float, typer.Option(help="An engine silent for so long is started afresh; 0: never.")
    ] = 300.0,
    promote_policy: Annotated[
        Policy, typer.Option(help="auto: promote and demote by popularity.")
    ] = "off",
    promote_min_tokens: Annotated[
        int, typer.Option(help="Recent tokens that make a candidate.")
    ] = 200_000,
    merged_gib: Annotated[
        float, typer.Option(min=0, help="GPU memory set aside for merged models.")
    ] = 0.0,
    promote_max_sets: Annotated[int, typer.Option(help="Promoted adapters at a time.")] = 1,
    promote_cool_down_s: Annotated[
        float, typer.Option(help="Between two changes of one adapter.")
    ] = 3600.0,
    promote_rows: Annotated[
        Path | None, typer.Option(help="Folder of NAME.jsonl: what auto calibrates on.")
    ] = None,
    promote_text: Annotated[
        Path | None, typer.Option(help="General text that auto calibrates on.")
    ] = None,
    promote_device: Annotated[PromotionDevice, typer.Option(help="Where auto computes.")] = "cpu",
    step_times: Annotated[
        Path | None, typer.Option(help="Measured steps for estimates, JSON.")
    ] = None,
    example_adapters: Annotated[
        bool, typer.Option("--example-adapters", help="Register json and pirate first.")
    ] = False,
) -> None:
    """Serve a base and its adapters over HTTP."""
    server = ServerConfig(
        host=host,
        port=port,
        api_keys=api_keys,
        max_waiting=max_waiting,
        max_waiting_per_tenant=max_waiting_per_tenant,
        drain_s=drain_s,
        engine_silence_s=engine_silence_s,
    )
    config = Config(
        model=base_config(
            base,
            base_name,
            quantization=quantization,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
        ),
        cache=CacheConfig(
            cpu_bytes=_bytes("--kv-gib", kv_gib),
            memory_fraction=kv_fraction,
            prefix_caching=prefix_caching,
        ),
        scheduler=SchedulerConfig(
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            max_prefill_tokens=max_prefill_tokens,
            token_fair=token_fair,
        ),
        adapters=adapter_config(
            store,
            allowed_roots=tuple(allowed_root or ()),
            allow_other_base=allow_other_base,
            bank_rows=bank_rows,
            max_rank=max_rank,
            host_bytes=_bytes("--host-gib", host_gib),
        ),
        server=server,
        promotion=PromotionConfig(
            policy=promote_policy,
            min_tokens=promote_min_tokens,
            memory_bytes=_bytes("--merged-gib", merged_gib),
            max_sets=promote_max_sets,
            cool_down_s=promote_cool_down_s,
            rows=promote_rows,
            text=promote_text,
            device=promote_device,
            step_times=step_times,
        ),
    )
    from server.__main__ import run

    run(config, example_adapters=example_adapters)


@app.command()
def doctor(
    base: Base = None,
    base_name: BaseName = None,
    quantization: Quantize = "nf4",
    bank_rows: BankRows = 512,
    kv_gib: KvGib = 1.0,
) -> None:
    """Say what this machine can run and hold.

    Exits with 1 if it is too small.
    """
    config = Config(
        model=base_config(base, base_name, quantization=quantization),
        cache=CacheConfig(cpu_bytes=_bytes("--kv-gib", kv_gib)),
        adapters=adapter_config(None, bank_rows=bank_rows),
    )
    from server.doctor import report

    if not report(config, Console()):
        raise typer.Exit(1)


@app.command(context_settings=PASSED_ON, add_help_option=False)
def loadtest(context: typer.Context) -> None:
    """Load an OpenAI-compatible server, and draw what comes of it."""
    from loadtest.cli import app as loadtest_app

    loadtest_app(context.args, prog_name="turnout loadtest")


@keys.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key: the tenant's name.")],
    file: Annotated[Path, typer.Option(help="Keys file, made if it is not there.")],
    scope: Annotated[
        str, typer.Option(help="Among infer, adapters and admin, with commas between.")
    ] = "infer",
) -> None:
    """Add a key to FILE and print it, this once.

    FILE holds only its hash.
    """
    scopes = frozenset(known for known in get_args(Scope) if known in scope.split(","))
    if len(scopes) != scope.count(",") + 1:
        raise ValueError(f"--scope is {scope!r}; it must be among {', '.join(get_args(Scope))}")
    if not name:
        raise ValueError("NAME is empty; it names the tenant")
    held = file.read_text(encoding="utf-8") if file.exists() else ""
    if name in {key.name for key in parse_keys(held, file)}:
        raise ValueError(f"{file} holds a key named {name!r} already")
    secret, key = new_key(name, scopes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as opened:
        if held and not held.endswith("\n"):  # edited by hand
            opened.write("\n")
        opened.write(key.line() + "\n")
    typer.echo(secret)


def _bytes(option: str, gib: float) -> int:
    if gib == math.inf:
        raise ValueError(f"{option} is {gib}; it must be finite")
    return int(gib * GIB)


def main(args: list[str] | None = None) -> None:
    """Run the command line; what the operator did wrong is one line on stderr and exit code 1."""
    _limit_spinning()
    # On some CPUs bitsandbytes offers a package, in words that look like a failure.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(args)
    except (ValueError, OSError, sqlite3.Error) as error:
        console = Console(stderr=True)  # a terminal gets whole words, a file whole lines
        is_file = not console.is_terminal
        said = f"turnout: {error}"
        console.print(said, style="red", markup=False, highlight=False, soft_wrap=is_file)
        sys.exit(1)


def _limit_spinning() -> None:
    """Bound how long torch's CPU threads spin while they wait for each other, before it is loaded.

    Without a bound one more busy process costs a step 30 times its time; docs/performance.md has
    the figures. An operator's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")
