"""Whose turn it is among waiting requests: the adapter that has been served the fewest tokens.

A virtual token counter for each adapter (VTC, arXiv:2401.00588): an adapter that returns after a
pause starts level with the least served of the others, so that idling earns no credit.
"""

from collections import deque
from collections.abc import Iterator

from server.engine.request import Request

_GENERATED_WEIGHT = 2  # a generated token costs about twice a prompt token
_MAX_IDLE_COUNTERS = 4096


class FairQueue:
    """Waiting requests, by adapter; within one adapter the oldest first."""

    def __init__(self, *, token_fair: bool) -> None:
        self._token_fair = token_fair
        self._queues: dict[str, deque[Request]] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def push(self, request: Request) -> None:
        """Queue a request behind older ones of its adapter."""
        key = request.fairness_key
        if key not in self._queues:
            self._queues[key] = deque()
            self._catch_up(key)
        queue = self._queues[key]
        place = len(queue)
        while place and queue[place - 1].arrival_time > request.arrival_time:
            place -= 1
        queue.insert(place, request)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        queue = self._queues[request.fairness_key]
        queue.remove(request)
        if not queue:
            del self._queues[request.fairness_key]

    def oldest(self) -> Request | None:
        """The request that has waited longest."""
        heads = [queue[0] for queue in self._queues.values()]
        return min(heads, key=lambda request: request.arrival_time, default=None)

    def candidates(self) -> Iterator[Request]:
        """Requests in the order in which they should be tried; removing the one in hand is allowed.

        An adapter's requests after one that stays queued are not offered: they would not fit either.
        """
        blocked: set[str] = set()
        while True:
            heads = [queue[0] for key, queue in self._queues.items() if key not in blocked]
            if not heads:
                return
            request = min(heads, key=self._turn)
            yield request
            queue = self._queues.get(request.fairness_key)
            if queue is not None and queue[0] is request:
                blocked.add(request.fairness_key)

    def charge(self, key: str, num_tokens: int, *, is_decode: bool) -> None:
        """Count tokens served to an adapter."""
        cost = num_tokens * (_GENERATED_WEIGHT if is_decode else 1)
        self._served[key] = self._served.get(key, 0) + cost

    def served(self, key: str) -> float:
        """What an adapter has been served, in weighted tokens."""
        return self._served.get(key, 0)

    def _turn(self, request: Request) -> tuple[float, float]:
        served = self.served(request.fairness_key) if self._token_fair else 0
        return (served, request.arrival_time)

    def _catch_up(self, key: str) -> None:
        others = [self.served(other) for other in self._queues if other != key]
        floor = min(others, default=0)
        self._served[key] = max(self.served(key), floor)
        if len(self._served) > _MAX_IDLE_COUNTERS:
            self._served = {k: v for k, v in self._served.items() if k in self._queues or v > floor}
