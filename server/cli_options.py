"""Options that several commands have, and the configs that they come to."""

from pathlib import Path
from typing import Annotated, Any

import typer

from server.config import AdapterConfig, ModelConfig, Quantization, state_folder
from server.default_base import DEFAULT_BASE_NAME, ensure_default_base

Base = Annotated[
    Path | None, typer.Option(help="Checkpoint folder. Default: SmolLM2-135M-Instruct, made once.")
]
BaseName = Annotated[str | None, typer.Option(help="What clients call it. Default: the folder's.")]
Quantize = Annotated[
    Quantization, typer.Option(help="NF4, a GPTQ checkpoint's 4 bits, or 16 bits.")
]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu.")]
StorePath = Annotated[
    Path | None, typer.Option(help="The store's folder. Default: .turnout/store.")
]
Url = Annotated[
    str | None,
    typer.Option(help="Work through this server. Default: the one that holds the store."),
]
ApiKey = Annotated[str | None, typer.Option(envvar="TURNOUT_API_KEY", help="For that server.")]


def base_config(path: Path | None, name: str | None, **options: Any) -> ModelConfig:
    """The base at `path`, or the default one, made if it is not there yet."""
    if path is None:
        return ModelConfig(path=ensure_default_base(), name=name or DEFAULT_BASE_NAME, **options)
    if not (path / "config.json").is_file():
        raise ValueError(f"--base is {str(path)!r}; it must be a folder that holds config.json")
    return ModelConfig(path=path, name=name or path.resolve().name, **options)


def adapter_config(store: Path | None, **options: Any) -> AdapterConfig:
    """The store at `store`, or the one in the state folder."""
    return AdapterConfig(store=store or state_folder() / "store", **options)
