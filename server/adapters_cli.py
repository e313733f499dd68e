"""`turnout adapters …`: register, publish and remove adapters."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from server.adapter_admin import Card, RemoteAdmin, open_admin
from server.cli_options import ApiKey, StorePath, Url, adapter_config, base_config

app = typer.Typer(
    help="Register, publish and remove adapters.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]


@app.command()
def push(
    name: Name,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="As PEFT saves it: config and safetensors.")
    ],
    publish: Annotated[bool, typer.Option(help="Make it what the name means.")] = True,
    base: Annotated[
        Path | None, typer.Option(help="Checkpoint to check it against while nothing serves.")
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="What clients call that base.")] = None,
    allow_other_base: Annotated[
        bool, typer.Option(help="Take it even if its config names another base.")
    ] = False,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            help="Take it even if turnout.json names another base, chat template or tokenizer."
        ),
    ] = False,
    store: StorePath = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Register the adapter in FOLDER as a revision of NAME."""
    from server.base_text import CheckpointText

    adapters = adapter_config(store, allow_other_base=allow_other_base)
    make_base = functools.partial(base_config, base, base_name)
    with open_admin(
        adapters,
        Console(stderr=True),
        base=make_base,
        text=CheckpointText,
        url=url,
        api_key=api_key,
    ) as admin:
        if allow_other_base and isinstance(admin, RemoteAdmin):
            raise ValueError(
                "--allow-other-base is for a store that nobody serves; a server that holds it "
                "takes such adapters when it was started with that option"
            )
        card = admin.push(name, folder, publish=publish, allow_mismatch=allow_mismatch)
    for field, difference in card["mismatches"].items():
        Console(stderr=True).print(f"note: {field}: {difference}", style="yellow", markup=False)
    _say(f"{card['id']} registered, digest {card['digest'][:12]}")


@app.command("list")
def list_all(store: StorePath = None, url: Url = None, api_key: ApiKey = None) -> None:
    """List the adapters."""
    with open_admin(adapter_config(store), Console(stderr=True), url=url, api_key=api_key) as admin:
        cards = admin.list_all()
    columns = (
        "name",
        "revision",
        "num_revisions",
        "max_rank",
        "num_bytes",
        "pinned",
        "path",
        "digest",
    )
    rows = [{**(card["current"] or {}), **card} for card in cards]
    _print_table(columns, rows, "No adapters are registered.")


@app.command()
def show(name: Name, store: StorePath = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Show one adapter and its revisions."""
    with open_admin(adapter_config(store), Console(stderr=True), url=url, api_key=api_key) as admin:
        card, revisions = admin.show(name)
    _say(_meaning(card))
    columns = ("revision", "max_rank", "num_bytes", "created", "path", "digest")
    _print_table(columns, revisions, "")


@app.command()
def publish(
    name: Name,
    revision: Annotated[
        int, typer.Argument(metavar="REVISION", help="What NAME shall mean.", min=1)
    ],
    store: StorePath = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Make REVISION what NAME means; requests under way keep theirs."""
    _change(name, "publish", store, url, api_key, revision)


@app.command()
def rollback(name: Name, store: StorePath = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Go back to what was published before."""
    _change(name, "rollback", store, url, api_key)


@app.command()
def pin(name: Name, store: StorePath = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Keep the adapter in the bank."""
    _change(name, "pin", store, url, api_key)


@app.command()
def unpin(name: Name, store: StorePath = None, url: Url = None, api_key: ApiKey = None) -> None:
    """Let it leave the bank again."""
    _change(name, "unpin", store, url, api_key)


@app.command()
def delete(
    model: Annotated[str, typer.Argument(metavar="NAME[@REVISION]", help="All of it, or one.")],
    store: StorePath = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Forget an adapter or a revision. Its bytes go with the last request that uses them."""
    name, at, number = model.partition("@")
    if at and not (number.isascii() and number.isdigit() and len(number) <= 9):
        raise ValueError(f"{model!r} names no revision; NAME@2 does")
    with open_admin(adapter_config(store), Console(stderr=True), url=url, api_key=api_key) as admin:
        admin.delete(name, int(number) if at else None)
    _say(f"{model} deleted")


def _change(
    name: str,
    action: str,
    store: Path | None,
    url: str | None,
    api_key: str | None,
    revision: int | None = None,
) -> None:
    with open_admin(adapter_config(store), Console(stderr=True), url=url, api_key=api_key) as admin:
        card = admin.change(name, action, revision)
    _say(_meaning(card))


def _meaning(card: Card) -> str:
    """What the name points to, in words."""
    current = card["current"]["id"] if card["current"] else "nothing: no revision is published"
    return f"{card['name']} means {current}{', pinned' if card['pinned'] else ''}"


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _print_table(columns: Sequence[str], cards: Sequence[Card], when_empty: str) -> None:
    """Print a line for each card; which path serves it only where a merged model does."""
    if not cards:
        _say(when_empty)
        return
    if all(card.get("path") != "merged" for card in cards):
        columns = [column for column in columns if column != "path"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        is_number = column not in ("name", "digest", "created", "pinned", "path")
        title = column.removeprefix("num_").replace("_", " ")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=True)
    for card in cards:
        table.add_row(*(_cell(column, card.get(column)) for column in columns))
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table as wide as it must be: a name that is cut cannot be copied."""
    console = Console()
    whole = console.options.update(max_width=1_000)
    width = max(console.width, console.measure(table, options=whole).maximum)
    Console(width=width).print(table, crop=False, soft_wrap=True)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "created":
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    if column == "digest":
        return str(value)[:12]
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:,}" if isinstance(value, int) else str(value)
