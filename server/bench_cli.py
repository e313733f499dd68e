"""`turnout bench …`: measure this machine. A command imports what it runs."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli_options import Base, Quantize, base_config

app = typer.Typer(
    help="Measure the engine on this machine, or a random 7B on its GPU.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _can_be_written(file: Path | None) -> Path | None:
    """The file, whose folder is there: it is written at the end of minutes."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"--json is {str(file)!r}; it must be a file in a folder that is there")
    return file


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", callback=_can_be_written, help="Write the figures to this file too."),
]


@app.command()
def engine(
    base: Base = None,
    quantization: Quantize = "nf4",
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests at a time; repeatable. Default: 1, 4 and 16."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="That each request generates.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="The median of so many counts.")] = 3,
    baseline: Annotated[bool, typer.Option(help="Run transformers + PEFT beside it.")] = True,
    http: Annotated[bool, typer.Option(help="Run a server process beside it too.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Tokens a second beside transformers + PEFT; needs no GPU.

    The base alone, with one adapter and with 8 mixed, in one batch after the other.
    """
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
def gpu_table(json_file: JsonFile = None) -> None:
    """Steps, prompts and loads of a 7B; needs a GPU, 21 GB of disk.

    Random weights, 32 adapters; all figures of the engine, and what a server adds. Beside each
    decode step stands what its bytes take at an H100's bandwidth.
    """
    _need_a_gpu("gpu-table")
    from server.bench.gpu_table import run

    run(json_file)


@app.command()
def merged(json_file: JsonFile = None) -> None:
    """A merged 7B against its adapter; needs a GPU, 22 GB of disk.

    Steps of each path alone, then streams that ask for 32 adapters, the most popular one merged
    or not.
    """
    _need_a_gpu("merged")
    from server.bench.merged import run

    run(json_file)


@app.command()
def popular(
    adapters: Annotated[int, typer.Option(min=1, help="Registered, of rank 4.")] = 1000,
    seconds: Annotated[
        float, typer.Option(min=1, help="Of asking, for each of the two rates.")
    ] = 180,
    json_file: JsonFile = None,
) -> None:
    """1,000 adapters by Zipf's law; needs a GPU and 37 GB of disk.

    Tokens a second of a random 7B, beside those with as few adapters as stay on the GPU, and how
    far memory grows. The base takes 15 GB of the disk, each adapter 22 MB.
    """
    _need_a_gpu("popular")
    from server.bench.popularity import run

    run(adapters, seconds, json_file)


@app.command()
def served(
    beside_merge: Annotated[
        bool,
        typer.Option("--beside-merge", help="Measure streams beside a merge too; 35 GB of disk."),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path(
        ".turnout/served"
    ),
    json_file: JsonFile = None,
) -> None:
    """Merged against adapter over HTTP; needs a GPU, 20 GB of disk.

    A random 7B in a server process of its own, which `turnout loadtest compare` asks.
    """
    _need_a_gpu("served")
    from server.bench.served import run

    run(json_file, out, beside_merge=beside_merge)


def _need_a_gpu(command: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"`turnout bench {command}` measures a GPU, and torch finds none here")
