"""JSON and form fields to a checked body, or a refusal that names the field."""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from server.errors import ServeError, bad_request


class StrictBody(BaseModel):
    """Strict: no coercion, no NaN, no field that is not listed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


Body = TypeVar("Body", bound=StrictBody)


def parse_body(kind: type[Body], data: bytes) -> Body:
    """Read a JSON body into `kind`. Raises ServeError 400 naming the first field that is wrong."""
    try:
        given = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    return _build(kind, given)


def parse_form(kind: type[Body], fields: Mapping[str, str]) -> Body:
    """Read form fields into `kind`: a field that is true or false is spelled as in JSON."""
    spelled = {"true": True, "false": False}
    flags = {name for name, field in kind.model_fields.items() if field.annotation is bool}
    given = {
        name: spelled.get(text, text) if name in flags else text for name, text in fields.items()
    }
    return _build(kind, given)


def _build(kind: type[Body], given: dict[str, Any]) -> Body:
    fields = {}
    for name, value in given.items():
        if value is None:  # null is OpenAI's "not given"
            if name not in kind.model_fields and name not in kind.unserved:
                raise _unknown(name)
        elif name not in kind.unserved:
            fields[name] = value
        elif value not in kind.unserved[name]:
            raise bad_request(f"{name} is not supported.", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _unknown(name: str) -> ServeError:
    shown = name[:64]
    return bad_request(f"Unknown field: {shown}.", param=shown, code="unknown_parameter")


def _refusal(error: ValidationError) -> ServeError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part)[:64] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(param)
    if first["type"] == "missing":
        return bad_request(f"{param} is required.", param=param, code="missing_parameter")
    code = "unsupported_parameter" if first["type"] == "unserved" else "invalid_value"
    return bad_request(f"{param}: {first['msg']}.", param=param, code=code)
