"""Operator routes: promote, demote, cancel a promotion; and whom to promote."""

import asyncio
import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.catalog import Revision
from adapters.manifest import AdapterConflict
from adapters.promotions import Backend, Device, MergeBase
from adapters.store import file_sha256
from server.api.parsing import StrictBody
from server.api.promoter import job_card
from server.api.services import Services, read_json, services_of
from server.errors import bad_request

MAX_BATCH = 4096  # rows of a step, in an estimate

INT32_MAX = 2**31 - 1

_Revision = Annotated[int | None, Field(ge=1, le=INT32_MAX)]


class GateBody(StrictBody):
    """Thresholds of the quality gate; what is not given has its default."""

    max_mean_kl: float | None = Field(default=None, ge=0)  # nats a token
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    max_loss_increase: float | None = Field(default=None, ge=0)  # share of the adapter path's
    loss_slack: float | None = Field(default=None, ge=0)  # nats a token


class PromoteBody(StrictBody):
    """POST /v1/adapters/{name}/promote."""

    revision: _Revision = None  # None: the published one
    merge_base: MergeBase = "auto"
    group_size: Literal[0, 32, 64, 128] = 0
    backend: Backend = "auto"  # of the quantizer
    rows: str | None = None  # a file beneath an allowed root
    rows_jsonl: str | None = None  # or its content
    eval_rows: str | None = None  # the same for rows to hold out
    eval_rows_jsonl: str | None = None
    text: str | None = None  # a file beneath an allowed root
    num_tokens: int = Field(default=16384, ge=512, le=1 << 24)
    gate: GateBody = GateBody()
    seed: int = Field(default=0, ge=0, le=INT32_MAX)
    device: Device = "cpu"
    wait_gpu_s: float = Field(default=0.0, ge=0, le=86_400)
    num_threads: int = Field(default=0, ge=0, le=1024)


class DemoteBody(StrictBody):
    """POST /v1/adapters/{name}/demote."""

    revision: _Revision = None
    keep: bool = False  # the artifact's files stay, unserved


async def promote_adapter(request: Request) -> Response:
    """Start making a model of its own for a revision: 202; 200 where it has one already."""
    services = services_of(request)
    body = await read_json(request, PromoteBody)
    revision = _revision(services, request.path_params["name"], body.revision)
    if body.rows is None and body.rows_jsonl is None and body.text is None:
        raise bad_request(
            "Nothing to calibrate on: rows (like those the adapter was trained on), text, or both.",
            param="rows",
            code="missing_parameter",
        )
    files: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    for field, named, given in (
        ("rows", body.rows, body.rows_jsonl),
        ("eval_rows", body.eval_rows, body.eval_rows_jsonl),
    ):
        if named is not None and given is not None:
            message = f"{field} and {field}_jsonl exclude each other."
            raise bad_request(message, param=f"{field}_jsonl")
        if given is not None:
            contents[field] = given.encode()
            files[f"{field}_sha256"] = hashlib.sha256(contents[field]).hexdigest()
        elif (file := _allowed_file(services, named, field)) is not None:
            files[field] = str(file)
            files[f"{field}_sha256"] = await asyncio.to_thread(file_sha256, file)
    if "rows_sha256" not in files and "eval_rows_sha256" in files:
        raise bad_request("eval_rows without rows: they are held out of others.", param="eval_rows")
    if (text := _allowed_file(services, body.text, "text")) is not None:
        files["text"] = str(text)
        files["text_sha256"] = await asyncio.to_thread(file_sha256, text)
    asked = services.promoter.request(
        revision,
        merge_base=body.merge_base,
        group_size=body.group_size,
        backend=body.backend,
        **files,
        num_tokens=body.num_tokens,
        gate=body.gate.model_dump(exclude_none=True),
        seed=body.seed,
        device=body.device,
        wait_gpu_s=body.wait_gpu_s,
        num_threads=body.num_threads,
        allow_other_base=services.config.adapters.allow_other_base,
    )
    state = await services.promoter.promote(asked, contents)
    if state is None:
        return JSONResponse(await services.promoter.card(revision))
    return JSONResponse(job_card(revision, state, None), status_code=202)


async def demote_adapter(request: Request) -> Response:
    """Serve a revision by the adapter path again."""
    services = services_of(request)
    body = await read_json(request, DemoteBody)
    revision = _revision(services, request.path_params["name"], body.revision)
    digest = await services.promoter.demote(revision, keep=body.keep)
    return JSONResponse({"id": revision.id, "artifact": digest, "kept": body.keep})


async def cancel_promotion(request: Request) -> Response:
    """End the promotion that is under way, of whichever of the adapter's revisions."""
    services, name = services_of(request), request.path_params["name"]
    under_way = set(await asyncio.to_thread(services.promoter.under_way))
    revisions = services.registry.revisions(name)
    mine = [revision for revision in revisions if revision.digest in under_way]
    revision = mine[-1] if mine else _revision(services, name, None)
    state = await services.promoter.cancel(revision)
    return JSONResponse(job_card(revision, state, None))


async def get_promotion(request: Request) -> Response:
    """A revision's job, its artifact, and which path serves it; `?revision=` or the published."""
    services = services_of(request)
    number = _number(request, "revision", INT32_MAX)
    revision = _revision(services, request.path_params["name"], number)
    return JSONResponse(await services.promoter.card(revision))


async def list_candidates(request: Request) -> Response:
    """Adapters by what promoting them would save; `?batch=` is the rows of a step."""
    services = services_of(request)
    batch = _number(request, "batch", MAX_BATCH)
    popularity = services.promoter.popularity
    found, assumed, recent = await asyncio.to_thread(popularity.candidates, batch)
    reply = {
        "object": "list",
        "batch": assumed,
        "recent_tokens": round(recent),
        "step_times": popularity.times.source,
        "data": [candidate.card(recent) for candidate in found],
    }
    return JSONResponse(reply)


def _revision(services: Services, name: str, number: int | None) -> Revision:
    """The revision that is meant. Raises AdapterNotFound, AdapterConflict."""
    if number is not None:
        return services.registry.resolve(f"{name}@{number}")
    current = services.registry.get(name).current
    if current is None:
        raise AdapterConflict(f"The adapter {name} has no published revision; name one.")
    return current


def _allowed_file(services: Services, path: str | None, param: str) -> Path | None:
    """The file that `path` names, links resolved, if it lies beneath an allowed root."""
    if path is None:
        return None
    if "://" in path or "\0" in path:
        raise bad_request(f"{param} must be a file of this server, never a URL.", param=param)
    for root in services.config.adapters.allowed_roots:
        file = (root.resolve() / path).resolve()  # an absolute path replaces the root
        if file.is_relative_to(root.resolve()):
            if not file.is_file():
                raise bad_request(f"{param} names no file: {path[:256]}", param=param)
            return file
    raise bad_request(
        f"{param} must lie beneath a folder that this server allows (--allowed-root); "
        "rows_jsonl and eval_rows_jsonl take the rows themselves.",
        param=param,
    )


def _number(request: Request, name: str, most: int) -> int | None:
    """A query parameter that is a whole number from 1 on."""
    given = request.query_params.get(name)
    if given is None:
        return None
    is_number = given.isascii() and given.isdigit() and len(given) <= len(str(most))
    if not is_number or not 1 <= int(given) <= most:
        raise bad_request(f"{name} must be a whole number from 1 to {most}.", param=name)
    return int(given)
