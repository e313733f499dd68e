"""From a checked request to its deltas of text: resolve, admit, submit, and let go.

Chat and completions differ before (how a prompt is made) and after (how a delta is written); what
lies between is here.
"""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api import sse
from server.api.choice import Choice, Delta, Plan, Target, resolve, resolve_again
from server.api.schemas import SamplingBody
from server.api.services import Services, services_of
from server.engine.messages import AddRequest, RequestOutput
from server.errors import ServeError, bad_request, engine_failed

Planner = Callable[[Target], Awaitable[list[Plan]]]


class Generation:
    """Every choice of one HTTP request: admitted, submitted and closed together.

    An async iterator of deltas, in the order in which the engine makes them. `close` gives back
    whatever is held, at any point, and may be called twice.
    """

    def __init__(self, services: Services, tenant: str, num_choices: int) -> None:
        """Admit the request. Raises ServeError 429 or 503."""
        admission = services.admission
        if num_choices > admission.max_at_once:
            raise bad_request(
                f"The request asks for {num_choices} choices; "
                f"the limit is {admission.max_at_once}.",
                param="n",
            )
        services.check_open()
        admission.take(tenant, num_choices)
        self._services = services
        self._tenant = tenant
        self._num_choices = num_choices
        self._arrival_time = time.monotonic()
        self._pending: dict[asyncio.Future[RequestOutput], Choice] = {}  # asked and not fed yet
        self._ready: deque[asyncio.Future[RequestOutput]] = deque()  # those of them that answered
        self._error: ServeError | None = None
        self._is_closed = False
        self.choices: list[Choice] = []
        self.target: Target | None = None

    async def begin(self, model: str, path: str | None, plan: Planner) -> Delta:
        """Resolve, plan, submit, and wait for the first delta of all."""
        self.target = resolve(self._services, model, path)
        plans = await plan(self.target)
        assert len(plans) == self._num_choices, "as many plans as were admitted"
        self.target = resolve_again(self._services, self.target, path)
        engine_id = uuid.uuid4().hex
        for index, each in enumerate(plans):
            request = AddRequest(
                request_id=f"{engine_id}-{index}",
                prompt_ids=each.prompt_ids,
                sampling=each.sampling,
                adapter=self.target.adapter,
                weight_set=self.target.weight_set,
                tenant=self._tenant,
                arrival_time=self._arrival_time,
            )
            self.choices.append(Choice(self._services, self.target, each, index, request))
        return await anext(self)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Delta:
        if all(choice.finish_reason is not None for choice in self.choices):
            raise StopAsyncIteration
        try:
            if len(self.choices) == 1:
                choice = self.choices[0]
                return choice.feed(await _next_output(choice))
            return await self._next_of_many()
        except ServeError as error:
            self._error = error
            raise

    async def _next_of_many(self) -> Delta:
        if not self._ready:
            if not self._pending:
                self._pending = {_ask(choice): choice for choice in self.choices}
            done, _ = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
            self._ready.extend(done)
        task = self._ready.popleft()
        choice = self._pending.pop(task)
        delta = choice.feed(task.result())
        if delta.finish_reason is None:
            self._pending[_ask(choice)] = choice
        return delta

    def close(self) -> None:
        """Abort what is unfinished; give back admission and lease."""
        if self._is_closed:
            return
        self._is_closed = True
        for task in self._pending:
            if not task.cancel() and not task.cancelled():
                task.exception()  # seen here: another choice's error ended the request
        for choice in self.choices:
            choice.close(self._error)
        self._services.admission.give_back(self._tenant, self._num_choices)
        if self.target is not None and self.target.lease is not None:
            lease = self.target.lease
            self._services.usage[lease.revision.digest] += sum(c.num_tokens for c in self.choices)
            # In a thread: the last lease of a deleted adapter waits for the disk.
            asyncio.get_running_loop().run_in_executor(None, lease.release)

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object; a prompt counts once, however many choices go on from it."""
        lengths = {id(choice.prompt_ids): len(choice.prompt_ids) for choice in self.choices}
        cached = lengths.copy()  # the least of a prompt's choices: one may find what another made
        for choice in self.choices:
            found = 0 if choice.first is None else choice.first.num_cached_tokens
            cached[id(choice.prompt_ids)] = min(cached[id(choice.prompt_ids)], found)
        num_prompt, num_cached = sum(lengths.values()), sum(cached.values())
        num_completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def headers(self) -> dict[str, str]:
        """Who answered, and where the adapter was when the request came."""
        assert self.target is not None, "begun"
        headers: dict[str, str] = {"x-serving-path": self.target.path}
        if (lease := self.target.lease) is not None:
            headers["x-adapter-id"] = lease.revision.id
            headers["x-adapter-digest"] = lease.revision.digest
            tiers = [choice.first.tier for choice in self.choices if choice.first is not None]
            if tiers and tiers[0] is not None:
                headers["x-adapter-tier"] = tiers[0]
        return headers


def _ask(choice: Choice) -> asyncio.Future[RequestOutput]:
    return asyncio.ensure_future(_next_output(choice))


async def _next_output(choice: Choice) -> RequestOutput:
    try:
        return await choice.stream.__anext__()
    except StopAsyncIteration:
        raise engine_failed("The engine ended this request without a reason.") from None


class Writer(Protocol):
    """How an API writes deltas."""

    def event(self, delta: Delta) -> bytes:
        """The server-sent events that tell this delta, or nothing."""
        ...

    def last_event(self) -> bytes:
        """What comes after every choice has finished, `[DONE]` aside."""
        ...

    def whole(self, deltas: Iterable[Delta]) -> bytes:
        """The one JSON object that tells them all."""
        ...


async def respond(
    request: Request,
    body: SamplingBody,
    num_choices: int,
    plan: Planner,
    writer: Callable[[Generation], Writer],
) -> Response:
    """Answer a request as a stream or whole. Errors before the first token are proper statuses."""
    services, receive = services_of(request), request.receive
    generation = Generation(services, request.state.tenant, num_choices)
    path = request.headers.get("x-serving-path")
    try:
        first = await services.guarded(receive, generation.begin(body.model, path, plan))
        write = writer(generation)
        if body.stream:
            return _EventStream(services, generation, write, first)
        deltas = await services.guarded(receive, _collect(generation, first))
        reply = Response(write.whole(deltas), headers=generation.headers())
        reply.headers["content-type"] = "application/json"
    except BaseException:
        generation.close()
        raise
    generation.close()
    return reply


async def _collect(generation: Generation, first: Delta) -> list[Delta]:
    deltas = [first]
    async for delta in generation:
        deltas.append(delta)  # noqa: PERF401 - the engine may fail between two
    return deltas


class _EventStream(Response):
    """Writes the generation as server-sent events and closes it, however the stream ends."""

    def __init__(
        self, services: Services, generation: Generation, write: Writer, first: Delta
    ) -> None:
        super().__init__(headers={**sse.HEADERS, **generation.headers()})
        del self.headers["content-length"]
        self._services, self._generation = services, generation
        self._write, self._first = write, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stall_s = self._services.config.server.stall_s
        work = sse.pump(send, self.raw_headers, self._events(), stall_s)
        try:
            await self._services.guarded(receive, work)
        finally:
            self._generation.close()

    async def _events(self) -> AsyncIterator[bytes]:
        yield self._write.event(self._first)
        async for delta in self._generation:
            yield self._write.event(delta)
        yield self._write.last_event() + sse.DONE
