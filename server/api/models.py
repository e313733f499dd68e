"""GET /v1/models, and /tokenize and /detokenize, which belong to a model too."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.catalog import Adapter, Revision
from adapters.rope import RopeScaling
from server.api.choice import resolve
from server.api.schemas import DetokenizeBody, TokenizeBody
from server.api.services import Services, read_json, services_of
from server.errors import bad_request

_OWNER = "turnout"


async def list_models(request: Request) -> Response:
    """The base, and every adapter that has a published revision."""
    services = services_of(request)
    cards = [
        _adapter_card(services, adapter.name, adapter.current, adapter)
        for adapter in services.registry.list()
        if adapter.current is not None
    ]
    return JSONResponse({"object": "list", "data": [_base_card(services), *cards]})


async def get_model(request: Request) -> Response:
    """One card, also of `name@revision`."""
    services, model = services_of(request), request.path_params["model"]
    target = resolve(services, model)
    if target.lease is None:
        return JSONResponse(_base_card(services))
    revision = target.lease.revision
    target.lease.release()
    adapter = services.registry.get(revision.name)
    return JSONResponse(_adapter_card(services, model, revision, adapter))


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of a chat as the template renders it."""
    services = services_of(request)
    body = await read_json(request, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Exactly one of prompt and messages is needed.", param="prompt")
    template, rope = _model_text(services, body.model)
    if body.prompt is not None:
        token_ids = await services.codec.run(
            len(body.prompt),
            services.codec.encode,
            body.prompt,
            add_special_tokens=body.add_special_tokens is not False,
        )
    else:
        messages = [message.for_template() for message in body.messages or ()]
        num_chars = sum(len(message["content"]) for message in messages) + (1 << 20)
        token_ids = await services.codec.run(
            num_chars,
            services.codec.encode_chat,
            messages,
            template=template,
            add_generation_prompt=body.add_generation_prompt,
            add_special_tokens=bool(body.add_special_tokens),
        )
    names = [services.codec.raw_token(token_id) for token_id in token_ids]
    reply = {
        "count": len(token_ids),
        "max_model_len": _max_model_len(services, rope),
        "tokens": token_ids,
        "token_strs": names if body.return_token_strs else None,
    }
    return JSONResponse(reply)


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens' names included."""
    services = services_of(request)
    body = await read_json(request, DetokenizeBody)
    _model_text(services, body.model)  # an unknown model is refused here as everywhere
    text = await services.codec.run(
        len(body.tokens), services.codec.decode, body.tokens, skip_special_tokens=False
    )
    return JSONResponse({"prompt": text})


def _model_text(services: Services, model: str | None) -> tuple[str | None, RopeScaling | None]:
    """A model's own chat template and RoPE scaling, where it has them."""
    target = resolve(services, model) if model is not None else None
    if target is None or target.lease is None:
        return None, None
    target.lease.release()
    return target.chat_template, target.lease.revision.rope


def _base_card(services: Services) -> dict[str, Any]:
    name = services.config.model.name
    return _card(
        services, name, root=f"base://{name}", parent=None, created=services.started, rope=None
    )


def _adapter_card(
    services: Services, model: str, revision: Revision, adapter: Adapter
) -> dict[str, Any]:
    return _card(
        services,
        model,
        root=f"adapter://{revision.id}",
        parent=services.config.model.name,
        created=int(adapter.created),
        rope=revision.rope,
    )


def _card(
    services: Services,
    model: str,
    *,
    root: str,
    parent: str | None,
    created: int,
    rope: RopeScaling | None,
) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": _OWNER,
        "root": root,
        "parent": parent,
        "max_model_len": _max_model_len(services, rope),
        "permission": [_permission(model, created)],
    }


def _permission(model: str, created: int) -> dict[str, Any]:
    return {
        "id": f"modelperm-{model}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def _max_model_len(services: Services, rope: RopeScaling | None) -> int | None:
    """None until the engine has found it out."""
    return services.engine.info.longest(rope) if services.engine.is_ready else None
