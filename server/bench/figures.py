"""Measured lines, shown as they come, then as a table and as JSON."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured line of the table."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    note: str = ""


def show(figures: Iterable[Figure], json_file: Path | None) -> list[Figure]:
    """Print each as it is measured and the table at the end; write them down if asked to."""
    console = Console(width=120)
    found = []
    for figure in figures:
        found.append(figure)
        console.print(f"{figure.name}: {figure.value:.3f} {figure.unit} {figure.note}")
    gpu = torch.cuda.get_device_name()
    console.print(_table(found, gpu))
    if json_file is not None:
        rows = {
            "torch": torch.__version__,
            "gpu": gpu,
            "date": time.strftime("%Y-%m-%d"),
            "figures": [asdict(figure) for figure in found],
        }
        json_file.write_text(json.dumps(rows, indent=1))
    return found


def _table(figures: list[Figure], gpu: str) -> Table:
    table = Table(title=f"Mistral-7B shape, NF4, {gpu}")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("floor", justify="right")
    table.add_column("")
    for figure in figures:
        floor = "" if figure.floor is None else f"{figure.floor:g}"
        table.add_row(figure.name, f"{figure.value:,.2f} {figure.unit}", floor, figure.note)
    return table
