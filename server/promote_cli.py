"""`turnout promote`, `turnout demote` and `turnout candidates`."""

import functools
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from adapters.promotions import ENDED, WAITING, Backend, Device, MergeBase
from server.adapter_admin import Card
from server.adapters_cli import print_whole
from server.cli_options import ApiKey, StorePath, Url, adapter_config, base_config
from server.promote_admin import PromotionAdmin, open_promotions

_POLL_S = 0.3
_LOAD_S = 120.0  # for the engine to load what was made
_MIB = 1 << 20

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
RevisionNumber = Annotated[
    int | None, typer.Option("--revision", min=1, help="Default: the published one.")
]


def promote(
    name: Name,
    revision: RevisionNumber = None,
    rows: Annotated[
        Path | None, typer.Option(help="Rows like those it was trained on: calibrate, gate.")
    ] = None,
    eval_rows: Annotated[Path | None, typer.Option(help="Rows for the gate alone.")] = None,
    text: Annotated[Path | None, typer.Option(help="General text to calibrate on.")] = None,
    merge_base: Annotated[
        MergeBase, typer.Option(help="original, dequantized, or the better one.")
    ] = "auto",
    group_size: Annotated[int, typer.Option(help="128, 64, 32; 0: the largest that fits.")] = 0,
    backend: Annotated[
        Backend, typer.Option(help="gptqmodel, or auto-round: slower, closer on small models.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=512, help="To calibrate on, at most.")] = 16384,
    gate: Annotated[
        list[str] | None, typer.Option(help="A threshold, say max_mean_kl=0.2; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is calibrated on.")] = 0,
    device: Annotated[Device, typer.Option(help="Where it computes.")] = "cpu",
    wait_gpu_s: Annotated[
        float, typer.Option(min=0, help="With --device cuda: wait so long for room.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(min=0, help="0: half of the cores.")] = 0,
    wait: Annotated[
        bool, typer.Option(help="Follow it to its end; without rows and text, one under way.")
    ] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Instead: end the one under way.")] = (
        False
    ),
    base: Annotated[
        Path | None, typer.Option(help="The base, while no server holds the store.")
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="What clients call that base.")] = None,
    store: StorePath = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Make a 4-bit model of its own for an adapter, and serve it.

    It is merged, quantized, held against the adapter (the gate) and registered.
    """
    make_base = functools.partial(base_config, base, base_name)
    options = {
        "merge_base": merge_base,
        "group_size": group_size,
        "backend": backend,
        "text": None if text is None else str(text.resolve()),
        "num_tokens": tokens,
        "gate": thresholds(gate or []),
        "seed": seed,
        "device": device,
        "wait_gpu_s": wait_gpu_s,
        "num_threads": threads,
    }
    with open_promotions(adapter_config(store), make_base, url=url, api_key=api_key) as admin:
        if cancel:
            _say(f"{admin.cancel(name)['id']}: promotion cancelled")
            return
        if rows is None and text is None:
            if not wait:
                raise ValueError("nothing to calibrate on: name --rows, --text, or both")
            _report(admin, name, revision)
            return
        if rows is None and eval_rows is not None:
            raise ValueError("--eval-rows without --rows: rows are held out of others")
        for option, path in (("rows", rows), ("eval-rows", eval_rows), ("text", text)):
            if path is not None and not path.is_file():
                raise ValueError(f"--{option} is {str(path)!r}; it must be a file")
        named = {"rows": rows, "eval_rows": eval_rows}
        files = {field: path for field, path in named.items() if path is not None}
        if not admin.promote(name, revision, files, options):
            _say(f"{name} has been promoted with these settings; it is served so again")
        elif wait:
            _report(admin, name, revision)
        else:
            _say(f"promotion of {name} begun; `turnout promote {name} --wait` follows it")


def demote(
    name: Name,
    revision: RevisionNumber = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the files, unserved.")] = False,
    store: StorePath = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Serve an adapter over the base again; delete its own model."""
    make_base = functools.partial(base_config, None, None)
    with open_promotions(adapter_config(store), make_base, url=url, api_key=api_key) as admin:
        card = admin.demote(name, revision, keep=keep)
    fate = "kept" if keep else "deleted"
    _say(f"{card['id']} goes by the adapter path; artifact {card['artifact'][:12]} {fate}")


def candidates(
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows of a step. Default: the mean so far.")
    ] = None,
    store: StorePath = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List adapters by what promoting them would save or lose."""
    make_base = functools.partial(base_config, None, None)
    with open_promotions(adapter_config(store), make_base, url=url, api_key=api_key) as admin:
        reply = admin.candidates(batch)
    if not reply["data"]:
        _say("No adapter has a published revision.")
        return
    table = Table()
    for title in ("adapter", "tokens", "recent", "share", "GPU-s saved", "MiB", "promote?"):
        table.add_column(title, justify="left" if title == "adapter" else "right", no_wrap=True)
    for card in reply["data"]:
        table.add_row(*_row(card))
    print_whole(table)
    rows = "1 row" if reply["batch"] == 1 else f"{reply['batch']} rows"
    _say(
        f"GPU-seconds saved over the recent {reply['recent_tokens']:,} tokens (half-life 6 h) "
        f"in steps of {rows}; below 0 a merge costs more than it saves. "
        f"Step times: {reply['step_times']}."
    )


def thresholds(given: list[str]) -> dict[str, float]:
    """`name=value` each. Raises ValueError for anything else."""
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise ValueError(f"--gate is {each!r}; it must be NAME=NUMBER, say max_mean_kl=0.2")
    return found


def _follow(admin: PromotionAdmin, name: str, revision: int | None) -> Card:
    """Show a bar until the job has ended; return the job."""
    job = admin.job(name, revision)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting", total=1.0)
        while True:
            has_ended = job["status"] in ENDED  # then its message is said in whole, below the bar
            said = (not has_ended and (job["message"] or job["stage"])) or job["status"]
            progress.update(bar, description=said[:48], completed=job["fraction"])
            if has_ended:
                return job
            time.sleep(_POLL_S)
            job = admin.job(name, revision)


def _report(admin: PromotionAdmin, name: str, revision: int | None) -> None:
    """Follow it and say how it ended. Raises ValueError where it failed."""
    try:
        job = _follow(admin, name, revision)
    except KeyboardInterrupt:
        _say(f"the promotion of {name} goes on: `turnout promote {name} --wait`, or --cancel")
        raise typer.Exit(130) from None
    if job["status"] != "done":
        raise ValueError(f"{job['id']} was not promoted: {job['message'] or job['status']}")
    deadline = time.monotonic() + _LOAD_S
    while job["path"] != "merged" and job["why"] in ("", WAITING) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        job = admin.job(name, revision)
    how = "served merged" if job["path"] == "merged" else f"by the adapter path: {job['why']}"
    _say(f"{job['id']} promoted, artifact {job['result']['artifact'][:12]}; {how}")


def _row(card: Card) -> list[str]:
    verdict = "promoted" if card["is_promoted"] else "yes" if card["pays"] else "no"
    if card["is_promoted"] and not card["pays"]:
        verdict = "promoted, loses"
    return [
        card["id"],
        f"{card['tokens']:,}",
        f"{card['recent_tokens']:,}",
        f"{card['share']:.1%}",
        f"{card['saved_gpu_seconds']:,.1f}",
        f"{card['num_bytes'] / _MIB:,.0f}",
        verdict,
    ]


def _say(text: str) -> None:
    console = Console()
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)
