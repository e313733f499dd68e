"""Operator routes: push, publish, roll back, pin, delete; and vLLM's load and unload."""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from adapters.catalog import Adapter, Revision
from adapters.manifest import (
    AdapterConflict,
    AdapterError,
    AdapterNotFound,
    AdapterRefused,
    show,
)
from adapters.registry import Deletion, Registry
from server.api.parsing import parse_form
from server.api.residency import follow_pin, load, unpin
from server.api.schemas import FormBody, LoadLoraBody, PublishBody, PushBody, UnloadLoraBody
from server.api.services import Services, read_json, services_of
from server.api.upload import FILES, receive_upload, upload_root
from server.errors import ServeError, bad_request


def as_serve_error(error: AdapterError) -> ServeError:
    """What a client is told of a registry's refusal."""
    if isinstance(error, AdapterNotFound):
        return ServeError(404, "adapter_not_found", error.message, param="name")
    if isinstance(error, AdapterConflict):
        return ServeError(409, "adapter_conflict", error.message)
    param = error.field if isinstance(error, AdapterRefused) else None
    return ServeError(400, "adapter_refused", error.message, param=param)


async def list_adapters(request: Request) -> Response:
    """Every adapter, published or not."""
    services = services_of(request)
    data = [_adapter(services, adapter) for adapter in services.registry.list()]
    return JSONResponse({"object": "list", "data": data})


async def get_adapter(request: Request) -> Response:
    """One adapter and what it points to."""
    services = services_of(request)
    adapter = services.registry.get(request.path_params["name"])
    card = None if adapter.current is None else await services.promoter.card(adapter.current)
    return JSONResponse({**_adapter(services, adapter), "promotion": card})


async def list_revisions(request: Request) -> Response:
    """An adapter's revisions, oldest first."""
    services = services_of(request)
    revisions = services.registry.revisions(request.path_params["name"])
    data = [_revision(services, revision) for revision in revisions]
    return JSONResponse({"object": "list", "data": data})


async def push_adapter(request: Request) -> Response:
    """Register an upload, or a folder beneath an allowed root, as a revision of `name`."""
    services = services_of(request)
    key = request.headers.get("idempotency-key")
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        body = await read_json(request, PushBody)
        folder = _allowed_folder(services, body.path, "path")
        return await _push(services, body, folder, key)
    root = upload_root(services.config.adapters)
    await asyncio.to_thread(root.mkdir, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        limit = services.config.adapters.max_upload_bytes
        fields = await receive_upload(request, Path(scratch), limit)
        form = parse_form(FormBody, fields)
        missing = [name for name in FILES[:2] if not (Path(scratch) / name).is_file()]
        if missing:
            raise bad_request(f"The upload lacks {missing[0]}.", param=missing[0])
        return await _push(services, form, Path(scratch), key)


async def publish_adapter(request: Request) -> Response:
    """Make a revision what the bare name means."""
    body = await read_json(request, PublishBody)
    return await _repoint(request, lambda r, name: r.publish(name, body.revision))


async def rollback_adapter(request: Request) -> Response:
    """Go back to what was published before."""
    return await _repoint(request, lambda r, name: r.rollback(name))


async def pin_adapter(request: Request) -> Response:
    """Load the adapter and keep it in the bank."""
    services, name = services_of(request), request.path_params["name"]
    was_pinned = services.registry.get(name).pinned
    adapter = await asyncio.to_thread(services.registry.pin, name)
    if adapter.current is not None:
        try:
            await load(services, adapter.current, pinned=True)
        except ServeError:
            if not was_pinned:
                await asyncio.to_thread(services.registry.unpin, name)
                unpin(services, adapter.current)
            raise
    return JSONResponse(_adapter(services, adapter))


async def unpin_adapter(request: Request) -> Response:
    """Let the adapter leave the bank when others need the room."""
    services, name = services_of(request), request.path_params["name"]
    adapter = await asyncio.to_thread(services.registry.unpin, name)
    if adapter.current is not None:
        unpin(services, adapter.current)
    return JSONResponse(_adapter(services, adapter))


async def delete_adapter(request: Request) -> Response:
    """Forget the name; requests under way keep theirs, and the last one frees the bytes."""
    return JSONResponse(await _delete(services_of(request), request.path_params["name"]))


async def delete_revision(request: Request) -> Response:
    """Forget one revision that the name does not mean, as `delete_adapter` forgets them all."""
    services, name = services_of(request), request.path_params["name"]
    number = _revision_number(name, request.path_params["revision"])
    deletion = await asyncio.to_thread(services.registry.delete_revision, name, number)
    card = {"id": f"{name}@{number}", **_deleted("adapter.revision.deleted", deletion)}
    return JSONResponse(card)


async def load_lora_adapter(request: Request) -> Response:
    """vLLM's run-time load: a folder beneath an allowed root, under a name."""
    services = services_of(request)
    body = await read_json(request, LoadLoraBody)
    if not body.lora_name or not body.lora_path:
        empty = "lora_path" if body.lora_name else "lora_name"
        raise _invalid("Both 'lora_name' and 'lora_path' must be provided.", empty)
    try:
        folder = _allowed_folder(services, body.lora_path, "lora_path")
        before = _current(services, body.lora_name)
        revision = await asyncio.to_thread(
            services.registry.push, body.lora_name, folder, replace=body.load_inplace
        )
    except AdapterNotFound as error:
        raise ServeError(404, "adapter_not_found", error.message, param="lora_path") from None
    except AdapterConflict:
        raise _invalid(
            f"The lora adapter '{body.lora_name}' has already been loaded. "
            "If you want to load the adapter in place, set 'load_inplace' to True.",
            "lora_name",
        ) from None
    except AdapterRefused as error:
        param = "lora_name" if error.field == "name" else error.field
        raise _invalid(error.message, param) from None
    await follow_pin(services, body.lora_name, before, revision)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """vLLM's run-time unload: here, a delete."""
    services = services_of(request)
    body = await read_json(request, UnloadLoraBody)
    if not body.lora_name:
        raise _invalid("'lora_name' must be provided.", "lora_name")
    try:
        await _delete(services, body.lora_name)
    except AdapterNotFound:
        message = f"The lora adapter '{body.lora_name}' cannot be found."
        raise ServeError(404, "adapter_not_found", message, param="lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _invalid(message: str, param: str | None) -> ServeError:
    return ServeError(400, "invalid_user_input", message, param=param, kind="InvalidUserInput")


def _allowed_folder(services: Services, path: str, param: str) -> Path:
    """The folder that `path` names, links resolved, if it lies beneath an allowed root."""
    roots = [root.resolve() for root in services.config.adapters.allowed_roots]
    if "://" in path or "\0" in path:
        raise _invalid(f"{param} must be a folder of this server, never a URL.", param)
    for root in roots:
        try:
            folder = (root / path).resolve()  # an absolute path replaces the root
            if not folder.is_relative_to(root):
                continue
            is_folder = folder.is_dir()
        except (OSError, RuntimeError):  # a name that is too long; links that go in a circle
            is_folder = False
        if not is_folder:
            message = f"{param} names no folder: {path[:256]}"
            raise ServeError(404, "adapter_not_found", message, param=param)
        return folder
    raise _invalid(f"{param} must lie beneath a folder that this server allows.", param)


async def _push(
    services: Services, body: PushBody | FormBody, folder: Path, key: str | None
) -> Response:
    if body.preload:
        services.check_open()  # before anything is registered
    before = _current(services, body.name)
    revision = await asyncio.to_thread(
        services.registry.push,
        body.name,
        folder,
        publish=body.publish,
        idempotency_key=key,
        allow_mismatch=body.allow_mismatch,
    )
    reply = _adapter(services, services.registry.get(body.name))
    reply["revision"] = _revision(services, revision)
    reply["mismatches"] = revision.source.get("mismatches", {})
    reply["loaded"] = False
    if body.publish:
        await follow_pin(services, body.name, before, revision)
    if body.preload:
        reply["loaded"] = await load(services, revision)
    return JSONResponse(reply, status_code=201)


async def _repoint(request: Request, change: Callable[[Registry, str], Revision]) -> Response:
    services, name = services_of(request), request.path_params["name"]
    before = _current(services, name)
    revision = await asyncio.to_thread(change, services.registry, name)
    await follow_pin(services, name, before, revision)
    return JSONResponse(_adapter(services, services.registry.get(name)))


async def _delete(services: Services, name: str) -> dict[str, Any]:
    adapter = services.registry.get(name)
    deletion = await asyncio.to_thread(services.registry.delete, name)
    if adapter.pinned and adapter.current is not None:
        unpin(services, adapter.current)
    services.metrics.forget_adapter(name)
    return {"name": name, **_deleted("adapter.deleted", deletion)}


def _deleted(kind: str, deletion: Deletion) -> dict[str, Any]:
    return {
        "object": kind,
        "deleted": True,
        "freed": list(deletion.freed),
        "draining": list(deletion.draining),
    }


def _revision_number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise AdapterNotFound(f"The adapter {show(name)} has no revision {show(text)}.")
    return int(text)


def _current(services: Services, name: str) -> Revision | None:
    try:
        return services.registry.get(name).current
    except AdapterNotFound:
        return None


def _adapter(services: Services, adapter: Adapter) -> dict[str, Any]:
    current = adapter.current
    return {
        "object": "adapter",
        "name": adapter.name,
        "created": int(adapter.created),
        "pinned": adapter.pinned,
        "num_revisions": adapter.num_revisions,
        "current": None if current is None else _revision(services, current),
    }


def _revision(services: Services, revision: Revision) -> dict[str, Any]:
    return {
        "object": "adapter.revision",
        "id": revision.id,
        "revision": revision.number,
        "digest": revision.digest,
        "created": int(revision.created),
        "max_rank": revision.max_rank,
        "num_rank_rows": revision.num_rank_rows,
        "num_parameters": revision.num_parameters,
        "num_bytes": revision.num_bytes,
        "is_resident": revision.digest in services.engine.stats.resident_adapters,
        "path": "adapter" if services.merged.route(revision.digest) is None else "merged",
        "num_leases": services.registry.num_leases(revision.digest),
    }
