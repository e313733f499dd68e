"""docs/promotion.md and docs/api.md name what there is, and nothing that is not."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import typer

from adapters.promotions import Stage, Status
from server import cli
from server.api.promotion import GateBody, PromoteBody
from server.config import PromotionConfig

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "promotion.md").read_text(encoding="utf-8")
API = (DOCS / "api.md").read_text(encoding="utf-8")


def options_of(*commands: str) -> set[str]:
    group = typer.main.get_command(cli.app)
    found = group.commands  # type: ignore[attr-defined]
    found = found | {f"bench {name}": each for name, each in found["bench"].commands.items()}
    return {
        option
        for command in commands
        for parameter in found[command].params
        for option in parameter.opts
    }


def test_every_option_that_is_named_is_one_of_the_commands() -> None:
    known = options_of("serve", "promote", "demote", "candidates", "bench merged")
    known.add("--rows-only")
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= known


def test_every_choice_of_the_server_is_documented() -> None:
    for field in fields(PromotionConfig):
        name = field.name.replace("_", "-")
        spelled = {"step-times": "--step-times", "memory-bytes": "--merged-gib"}.get(name)
        spelled = spelled or f"--promote-{name}"
        assert spelled in options_of("serve")
        assert re.search(rf"{spelled}[ `]", PAGE), spelled


def test_every_state_and_stage_is_explained() -> None:
    for word in (*get_args(Status), *get_args(Stage)):
        assert f"| `{word}` |" in PAGE, word


def test_every_field_of_a_request_is_documented() -> None:
    for name in (*PromoteBody.model_fields, *GateBody.model_fields):
        assert f"`{name}`" in API, name
