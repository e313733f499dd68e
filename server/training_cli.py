"""`turnout train`, `turnout merge` and `turnout quantize`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server import adapters_cli
from server.base_digest import base_digest
from server.cli_options import (
    ApiKey,
    Base,
    BaseName,
    Device,
    StorePath,
    Url,
    adapter_config,
    base_config,
)
from server.default_base import ensure_default_base

AllowOtherBase = Annotated[
    bool, typer.Option(help="Take an adapter whose config names another base.")
]


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
    store: StorePath = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Train an adapter on a file of rows.

    Every setting is an option, --rank 8 say; --settings lists them all.
    """
    if list_settings:
        _refuse_beside_settings(context)
    if register is None:
        _refuse_what_registers(context)
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
    said = f"The adapter is in {settings.out}, its curves in\n{settings.out / 'report.html'}"
    console.print(said, markup=False, soft_wrap=True)
    if register is not None:
        adapters_cli.push(
            register, settings.out, base=settings.base, store=store, url=url, api_key=api_key
        )


def merge(
    adapter: Annotated[str, typer.Option(help="A PEFT folder, or NAME or NAME@REVISION.")],
    merge_base: Annotated[
        str, typer.Option(help="original (16 bit) or dequantized (NF4's values, as served).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    base: Base = None,
    base_name: BaseName = None,
    store: StorePath = None,
    probe: Annotated[
        Path | None, typer.Option(help="Texts to compare on, blank lines between them.")
    ] = None,
    device: Device = "auto",
    allow_other_base: AllowOtherBase = False,
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
    device: Device = "auto",
    backend: Annotated[
        str, typer.Option(help="gptqmodel, or auto-round: slower, closer on small models.")
    ] = "auto",
    quantizer: Annotated[
        Path | None, typer.Option(help="Python that has the quantizer; see `make quantizer`.")
    ] = None,
    base: Base = None,
    base_name: BaseName = None,
    store: StorePath = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Make 4-bit or GGUF files of a merged model or an adapter."""
    from training.quantize_cli import Request, run

    base_model = base_config(base, base_name) if adapter is not None else None
    request = Request(
        out=out,
        kind=kind,
        model=model,
        adapter=adapter,
        base=base_model.path if base_model else None,
        base_name=base_model.name if base_model else None,
        store=adapter_config(store).store,
        given=_typed(context),
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


def _refuse_beside_settings(context: typer.Context) -> None:
    given = sorted(_typed(context) - {"list_settings"})
    options = [f"--{name.replace('_', '-')}" for name in given]
    if beside := [*options, *context.args]:
        raise ValueError(f"--settings only lists the settings: leave out {' '.join(beside)}")


def _refuse_what_registers(context: typer.Context) -> None:
    for name in sorted(_typed(context) & {"store", "url", "api_key"}):
        raise ValueError(f"--{name.replace('_', '-')} does nothing without --register")


def _typed(context: typer.Context) -> frozenset[str]:
    """Options that stand on the command line; not what a default or the environment gave."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(
        name for name, source in sources.items() if source and source.name == "COMMANDLINE"
    )
