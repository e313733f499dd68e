"""Whom to ask and how: a server, and the body of each request."""

import math
import random
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from loadtest.trace import Line

Endpoint = Literal["completions", "chat"]
Prompt = Literal["words", "ids"]

# Each is one token, with the blank before it, in the vocabularies of Llama, Mistral, GPT-2 and
# their kin, so that so many words are about so many tokens for a server of any base.
_COMMON = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many "
    "must through back years where much your way well down should because each just those people "
    "how too little state good very make world still see own work long here get both between life "
    "being under never day same another know while last might us great old year off come since"
)
_WORDS = _COMMON.split()

_SECRET_HEADERS = frozenset(
    {"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"}
)


_HEADER_TEXT = re.compile("[\t\x20-\x7e\x80-\xff]*")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A server, and how requests are put to it."""

    url: str = "http://127.0.0.1:8000"
    endpoint: Endpoint = "completions"
    model: str | None = None  # asked for in place of the trace's
    headers: dict[str, str] = {}
    api_key: str | None = None
    tenant_keys: dict[str, str] = {}  # a tenant's own key
    prompt: Prompt = "words"
    token_ids: tuple[int, int] = (300, 4000)  # ids of an `ids` prompt: from, up to but without
    temperature: float = 0.0
    ignore_eos: bool = True  # generate every token asked for; an extension that vLLM has too
    expect_path: str | None = None  # what x-serving-path must say
    timeout_s: float = 120.0  # for a whole reply

    def __post_init__(self) -> None:
        if not is_url(self.url):
            raise ValueError(
                f"url is {_without_password(self.url)!r}; it must be http://host:port or https://…"
            )
        for named, text in self._texts():
            if not _HEADER_TEXT.fullmatch(text):
                raise ValueError(f"{named} has a character that no HTTP header can carry")
        low, high = self.token_ids
        if not 0 <= low < high:
            raise ValueError(f"token_ids is {low}:{high}; it must be a range of ids")
        if self.prompt == "ids" and self.endpoint == "chat":
            raise ValueError("prompt is 'ids', which a chat cannot be; ask completions")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be over 0")

    def _texts(self) -> Iterator[tuple[str, str]]:
        """What goes into headers, and what an error calls it; no key is shown."""
        for name, value in self.headers.items():
            yield f"header {name!r}", f"{name}{value}"
        keys = {"": self.api_key or "", **self.tenant_keys}
        yield from ((f"the API key {tenant}".rstrip(), key) for tenant, key in keys.items())

    @property
    def path(self) -> str:
        """Of the endpoint, below the server's root; `url` may end with /v1 as OpenAI's does."""
        root = urllib.parse.urlsplit(self.url).path.rstrip("/").removesuffix("/v1")
        return f"{root}/v1/{'chat/completions' if self.endpoint == 'chat' else 'completions'}"

    @property
    def root(self) -> str:
        """The server's own address, without /v1."""
        return self.url.rstrip("/").removesuffix("/v1")

    def model_of(self, line: Line) -> str:
        return self.model or line.model

    def headers_of(self, tenant: str) -> dict[str, str]:
        """What a tenant's request carries, its key included."""
        key = self.tenant_keys.get(tenant, self.api_key)
        return {**({"authorization": f"Bearer {key}"} if key else {}), **self.headers}

    def described(self) -> dict[str, str]:
        """What a report may show: no key, no secret header."""
        shown = {
            f"header {name}": "…" if name.lower() in _SECRET_HEADERS else value
            for name, value in self.headers.items()
        }
        if self.model is not None:
            shown["model"] = self.model
        return {
            "url": self.url,
            "endpoint": self.endpoint,
            "prompt": self.prompt,
            "temperature": f"{self.temperature:g}",
            "ignore_eos": str(self.ignore_eos).lower(),
            **shown,
        }


def body_of(target: Target, line: Line, *, greedy: bool = False) -> bytes:
    """The JSON of one request, always a stream with its usage at the end."""
    body: dict[str, object] = {"model": target.model_of(line)}
    if target.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": words(line)}]
    else:
        body["prompt"] = words(line) if target.prompt == "words" else ids(line, target.token_ids)
    body |= {
        "max_tokens": line.output_tokens,
        "temperature": 0.0 if greedy else target.temperature,
        "seed": line.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": line.tenant,
    }
    if target.ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


def encode_payloads(target: Target, lines: Iterable[Line]) -> bytes:
    """A trace's bodies with their times in ms, as JSONL: aiperf's `mooncake_trace`."""
    return b"".join(
        b'{"timestamp":%d,"payload":%s}\n' % (round(line.time_s * 1000), body_of(target, line))
        for line in lines
    )


def request_bytes(target: Target, line: Line, *, greedy: bool = False) -> bytes:
    """A whole HTTP/1.1 request, head and body."""
    body = body_of(target, line, greedy=greedy)
    parts = urllib.parse.urlsplit(target.url)
    headers = {
        "host": parts.netloc,
        "content-type": "application/json",
        "accept": "text/event-stream",
        "content-length": str(len(body)),
        **target.headers_of(line.tenant),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {target.path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def words(line: Line) -> str:
    """A prompt of as many common words as the line has tokens; its seed decides which."""
    return " ".join(random.Random(line.seed).choices(_WORDS, k=line.prompt_tokens))


def ids(line: Line, token_ids: tuple[int, int]) -> list[int]:
    """A prompt of exactly as many token ids as the line has tokens."""
    low, high = token_ids
    return random.Random(line.seed).choices(range(low, high), k=line.prompt_tokens)


def is_url(text: str) -> bool:
    """Whether this is a server's address, and nothing that would not be heeded beside it."""
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    labels = (parts.hostname or "").removesuffix(".").split(".")
    return (
        parts.scheme in ("http", "https")
        and all(0 < len(label) < 64 for label in labels)  # or no name server can be asked
        and port != 0
        and not (parts.username or parts.password or parts.query or parts.fragment)
        and text.isascii()
        and text.isprintable()
        and " " not in text
    )


def _without_password(url: str) -> str:
    """A URL as it may be shown, right or wrong."""
    scheme, slashes, rest = url.partition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"
