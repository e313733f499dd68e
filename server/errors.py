"""Every failure that a client can see, as one exception type with an HTTP status."""


class ServeError(Exception):
    """Something a client must be told: a status, a code and a message that holds the numbers."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.kind = kind or _KINDS.get(status, "InternalServerError")
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class WeightSetRefused(Exception):
    """A merged model cannot be served beside the base; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


def bad_request(
    message: str, *, param: str | None = None, code: str = "invalid_value"
) -> ServeError:
    """A field whose value cannot be served."""
    return ServeError(400, code, message, param=param)


def model_not_found(name: str) -> ServeError:
    """No base and no adapter has this name; the base never answers in its place."""
    return ServeError(404, "model_not_found", f"The model {name!r} does not exist.", param="model")


def overloaded(message: str, *, retry_after_s: float, tenant: bool = False) -> ServeError:
    """Refused before the first byte: 429 for one tenant's share, 503 for the server's."""
    status, code = (429, "tenant_overloaded") if tenant else (503, "server_overloaded")
    return ServeError(status, code, message, retry_after_s=retry_after_s)


def engine_failed(message: str) -> ServeError:
    """The engine died or could not finish this request."""
    return ServeError(503, "engine_failed", message, retry_after_s=1.0)
