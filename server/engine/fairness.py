"""Whose turn it is among waiting requests: the adapter that has been served the fewest tokens.

A virtual token counter for each adapter (VTC, arXiv:2401.00588): an adapter that returns after a
pause starts level with the least served of those that wait, or with the last that did, so that
idling earns no credit.
"""

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace

from server.engine.request import Request

_GENERATED_WEIGHT = 2  # a generated token costs about twice a prompt token
_MAX_IDLE_COUNTERS = 4096


class FairQueue:
    """Waiting requests, by adapter; within one adapter the oldest first."""

    def __init__(self, *, token_fair: bool) -> None:
        self._token_fair = token_fair
        self._queues: dict[str, deque[Request]] = {}
        self._served: dict[str, float] = {}
        self._last_turn: dict[str, float] = {}  # when a request of the adapter was last admitted
        self._last_left = ""  # whose queue was the last to become empty

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
        key = request.fairness_key
        self._queues[key].remove(request)
        if not self._queues[key]:
            del self._queues[key]
            self._last_left = key

    def admit(self, request: Request, now: float) -> None:
        """Take a request out to run: its adapter has had a turn."""
        self.remove(request)
        self._last_turn[request.fairness_key] = now

    def most_overdue(self) -> Request | None:
        """The first request of the adapter that has had no turn for longest."""
        heads = [queue[0] for queue in self._queues.values()]
        return min(heads, key=self.waiting_since, default=None)

    def waiting_since(self, request: Request) -> float:
        """Since when a request waits with none of its adapter's having been admitted."""
        last_turn = self._last_turn.get(request.fairness_key, request.queued_time)
        return max(request.queued_time, last_turn)

    def candidates(self) -> Iterator[Request]:
        """Requests in the order in which they should be tried; removing the one in hand is allowed.

        An adapter's requests behind one that stays queued are not offered: they wait for it.
        """
        heads = [(*self._turn(queue[0]), key) for key, queue in self._queues.items()]
        heapify(heads)
        while heads:
            key = heads[0][-1]
            request = self._queues[key][0]
            yield request
            queue = self._queues.get(key)
            if queue is not None and queue[0] is not request:
                heapreplace(heads, (*self._turn(queue[0]), key))
            else:
                heappop(heads)

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
        floor = min(others, default=self.served(self._last_left))
        self._served[key] = max(self.served(key), floor)
        if len(self._served) > _MAX_IDLE_COUNTERS:
            kept = {*self._queues, self._last_left}
            self._served = {k: v for k, v in self._served.items() if k in kept or v > floor}
            self._last_turn = {k: v for k, v in self._last_turn.items() if k in self._served}
