"""The `turnout` command. A subcommand imports what it runs, so that --help loads no torch."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from server import adapters_cli, promote_cli
from server.adapters_cli import adapter_config, base_config
from server.api.auth import Scope, load_keys, new_key
from server.base_digest import base_digest
from server.config import (
    CacheConfig,
    Config,
    Dtype,
    Policy,
    PromotionConfig,
    PromotionDevice,
    Quantization,
    SchedulerConfig,
    ServerConfig,
)
from server.default_base import ensure_default_base

GIB = 1 << 30

app = typer.Typer(
    help="Serve many LoRA adapters over one quantized Mistral base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut long options off at 80 columns
)
keys = typer.Typer(help="Make API keys.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(adapters_cli.app, name="adapters")
app.add_typer(keys, name="keys")
for command in (promote_cli.promote, promote_cli.demote, promote_cli.candidates):
    app.command()(command)

Base = Annotated[
    Path | None, typer.Option(help="Checkpoint folder. Default: SmolLM2-135M-Instruct, made once.")
]
BaseName = Annotated[str | None, typer.Option(help="What clients call it. Default: the folder's.")]
Quantize = Annotated[
    Quantization, typer.Option(help="NF4, a GPTQ checkpoint's 4 bits, or 16 bits.")
]
BankRows = Annotated[int, typer.Option(help="Rank rows of resident adapters.")]
KvGib = Annotated[float, typer.Option(min=0, help="KV cache on a machine without a GPU.")]


@app.command()
def serve(
    base: Base = None,
    base_name: BaseName = None,
    quantization: Quantize = "nf4",
    dtype: Annotated[Dtype, typer.Option(help="Of activations and KV.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    max_model_len: Annotated[int, typer.Option(help="Tokens; 0: the base's own limit.")] = 0,
    host: Annotated[str, typer.Option(help="Beyond loopback, --api-keys is needed.")] = "127.0.0.1",
    port: int = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="File that `keys new` writes.")] = None,
    store: adapters_cli.StorePath = None,
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
            cpu_bytes=int(kv_gib * GIB), memory_fraction=kv_fraction, prefix_caching=prefix_caching
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
            host_bytes=int(host_gib * GIB),
        ),
        server=server,
        promotion=PromotionConfig(
            policy=promote_policy,
            min_tokens=promote_min_tokens,
            memory_bytes=int(merged_gib * GIB),
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
        cache=CacheConfig(cpu_bytes=int(kv_gib * GIB)),
        adapters=adapter_config(None, bank_rows=bank_rows),
    )
    from server.doctor import report

    if not report(config, Console()):
        raise typer.Exit(1)


@app.command()
def bench(
    base: Base = None,
    quantization: Quantize = "nf4",
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; repeatable.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="The median of so many counts.")] = 3,
    baseline: Annotated[bool, typer.Option(help="Run transformers + PEFT beside it.")] = True,
    http: Annotated[bool, typer.Option(help="Run a server process beside it too.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    gpu_table: Annotated[
        bool, typer.Option("--gpu-table", help="Instead: a random 7B on this GPU, all figures.")
    ] = False,
    popular: Annotated[
        int, typer.Option(help="Instead: so many adapters over that 7B, asked for by Zipf's law.")
    ] = 0,
    merged: Annotated[
        bool, typer.Option("--merged", help="Instead: a merged 7B against its adapter.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="With --popular: how long they are.")] = 180,
    served: Annotated[
        bool, typer.Option("--served", help="Instead: the same, through a server and HTTP.")
    ] = False,
    beside_merge: Annotated[
        bool, typer.Option("--beside-merge", help="With --served: streams beside a merge too.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="With --served: folder for report.json and report.html.")
    ] = Path(".turnout/served"),
) -> None:
    """Measure the engine without HTTP, beside transformers + PEFT."""
    if beside_merge and not served:
        raise ValueError("--beside-merge is a part of --served")
    if gpu_table:
        from server.bench.gpu_table import run as run_gpu_table

        run_gpu_table(json_file)
        return
    if merged:
        from server.bench.merged import run as run_merged

        run_merged(json_file)
        return
    if served:
        from server.bench.served import run as run_served

        run_served(json_file, out, beside_merge=beside_merge)
        return
    if popular:
        from server.bench.popularity import run as run_popularity

        run_popularity(popular, seconds, json_file)
        return
    model = base_config(base, None, quantization=quantization)
    from server.bench.run import BenchOptions, run

    options = BenchOptions(
        model=model,
        batch_sizes=tuple(batch or (1, 4, 16)),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        baseline=baseline,
        http=http,
        json_file=json_file,
    )
    run(options)


@app.command()
def merge(
    adapter: Annotated[str, typer.Option(help="A PEFT folder, or NAME or NAME@REVISION.")],
    merge_base: Annotated[
        str, typer.Option(help="original (16 bit) or dequantized (NF4's values, as served).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    base: Base = None,
    base_name: BaseName = None,
    store: adapters_cli.StorePath = None,
    probe: Annotated[
        Path | None, typer.Option(help="Texts to compare on, blank lines between them.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    allow_other_base: Annotated[
        bool, typer.Option(help="Take an adapter whose config names another base.")
    ] = False,
) -> None:
    """Fold an adapter into its base.

    Makes a checkpoint of its own, and says how far its logits drift.
    """
    model = base_config(base, base_name)
    from training.merge import MergeOptions, run

    options = MergeOptions(
        adapter=adapter,
        base=model.path,
        base_name=model.name,
        merge_base=merge_base,
        out=out,
        store=adapter_config(store).store,
        probe=probe,
        device=device,
        allow_other_base=allow_other_base,
    )
    run(options, base_digest(model.path), Console())


@app.command()
def quantize(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder or GGUF file to make.")],
    model: Annotated[
        Path | None, typer.Option(help="A merged checkpoint; or name --adapter instead.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A PEFT folder, NAME or NAME@REVISION: merged, quantized and gated."),
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", help="gptq, awq, gguf-f16, gguf-q8_0 or gguf-lora.")
    ] = "gptq",
    merge_base: Annotated[
        str, typer.Option(help="original, dequantized, or auto: both, and the better one.")
    ] = "auto",
    group_size: Annotated[
        int, typer.Option(help="128, 64 or 32; 0: the largest that fits every layer.")
    ] = 0,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="GPTQ's order of inputs: better, slower to serve.")
    ] = False,
    iterations: Annotated[int, typer.Option(min=1, help="Of auto-round.")] = 40,
    rows: Annotated[
        Path | None, typer.Option(help="The adapter's training rows, to calibrate and gate on.")
    ] = None,
    eval_rows: Annotated[Path | None, typer.Option(help="Rows that are held out.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="General text, blank lines between paragraphs.")
    ] = None,
    text_share: Annotated[float, typer.Option(help="Of the tokens, beside rows.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="To calibrate on, at most.")] = 16384,
    seed: Annotated[int, typer.Option(min=0, help="Of what is calibrated on.")] = 0,
    gate: Annotated[
        list[str] | None, typer.Option(help="A threshold, say max_mean_kl=0.2; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="gptqmodel, or auto-round: slower, closer on small models.")
    ] = "auto",
    quantizer: Annotated[
        Path | None, typer.Option(help="Python that has the quantizer; see `make quantizer`.")
    ] = None,
    base: Base = None,
    base_name: BaseName = None,
    store: adapters_cli.StorePath = None,
    allow_other_base: Annotated[
        bool, typer.Option(help="Take an adapter whose config names another base.")
    ] = False,
) -> None:
    """Make 4-bit or GGUF files of a merged model or an adapter."""
    from training.quantize_cli import Request, given_options, run

    base_model = base_config(base, base_name) if adapter is not None else None
    request = Request(
        out=out,
        kind=kind,
        model=model,
        adapter=adapter,
        base=base_model.path if base_model else None,
        base_name=base_model.name if base_model else None,
        store=adapter_config(store).store,
        given=given_options(context),
        allow_other_base=allow_other_base,
        merge_base=merge_base,
        group_size=group_size,
        desc_act=desc_act,
        iterations=iterations,
        rows=rows,
        eval_rows=eval_rows,
        text=text,
        text_share=text_share,
        tokens=tokens,
        seed=seed,
        gate=tuple(gate or ()),
        device=device,
        backend=backend,
        quantizer=quantizer,
    )
    run(request, Console())


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
def loadtest(context: typer.Context) -> None:
    """Load an OpenAI-compatible server, and draw what comes of it."""
    from loadtest.cli import app as loadtest_app

    loadtest_app(context.args, prog_name="turnout loadtest")


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def train(
    context: typer.Context,
    base: Base = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows: JSONL, JSON, CSV, Parquet, a datasets folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the adapter.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last checkpoint in OUT.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that OUT holds.")
    ] = False,
    list_settings: Annotated[
        bool, typer.Option("--settings", help="List every setting; each is an option too.")
    ] = False,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes that share each step's rows, with a GPU each.")
    ] = 1,
    register: Annotated[
        str | None, typer.Option(help="Push the result under this name when it is done.")
    ] = None,
    store: adapters_cli.StorePath = None,
    url: adapters_cli.Url = None,
    api_key: adapters_cli.ApiKey = None,
) -> None:
    """Train an adapter on a file of rows.

    Every setting is an option, --rank 8 say; --settings lists them all.
    """
    from training import distributed, run

    if list_settings:
        run.show_settings(Console())
        return
    run.check_name(register)
    given = {"base": base, "data": data, "out": out}
    how = {"resume": resume, "overwrite": overwrite}
    with distributed.join(num_processes) as group:
        console = Console(quiet=not group.is_first)
        settings = run.settings_of(config, given, context.args, ensure_default_base, console)
        prepared = run.prepare(settings)
        run.show(prepared, console)
        if dry_run:
            return
        digest = base_digest(settings.base)
        if num_processes > group.size:
            run.train_in_processes(num_processes, settings, digest, **how)
        else:
            run.train(prepared, digest, console, **how, group=group)
    if not group.is_first:
        return
    said = f"The adapter is in {settings.out}; {settings.out / 'report.html'} has the curves."
    console.print(said, markup=False, soft_wrap=True)
    if register is not None:
        adapters_cli.push(
            register, settings.out, base=settings.base, store=store, url=url, api_key=api_key
        )


@keys.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Whose key: the tenant's name.")],
    file: Annotated[Path, typer.Option(help="Keys file, made if it is not there.")],
    scope: Annotated[
        str, typer.Option(help="Among infer, adapters and admin, with commas between.")
    ] = "infer",
) -> None:
    """Add a key to FILE, which holds only its hash, and print the key, this once."""
    scopes = frozenset(known for known in get_args(Scope) if known in scope.split(","))
    if len(scopes) != scope.count(",") + 1:
        raise ValueError(f"--scope is {scope!r}; it must be among {', '.join(get_args(Scope))}")
    if file.exists() and name in {key.name for key in load_keys(file)}:
        raise ValueError(f"{file} holds a key named {name!r} already")
    secret, key = new_key(name, scopes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(key.line() + "\n")
    typer.echo(secret)


def main(args: list[str] | None = None) -> None:
    """Run the command line; what the operator did wrong is one line on stderr and exit code 1."""
    _limit_spinning()
    # On some CPUs bitsandbytes offers a package, in words that look like a failure.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(args)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(
            f"turnout: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(1)


def _limit_spinning() -> None:
    """Bound how long torch's CPU threads spin while they wait for each other, before it is loaded.

    Without a bound one more busy process costs a step 30 times its time; docs/performance.md has
    the figures. An operator's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")
