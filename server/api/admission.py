"""How much is taken on: counted before the first byte, in all and for each tenant."""

from collections import Counter

from server.errors import overloaded

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts admitted requests. Never more than `max_total`, nor `max_per_tenant` of one tenant."""

    def __init__(self, max_total: int, max_per_tenant: int) -> None:
        self.max_total = max_total
        self.max_per_tenant = max_per_tenant
        self.num_admitted = 0
        self._by_tenant: Counter[str] = Counter()

    @property
    def max_at_once(self) -> int:
        """The most that one tenant could ever have admitted."""
        return min(self.max_total, self.max_per_tenant)

    def take(self, tenant: str, num_requests: int) -> None:
        """Admit so many requests, or none. Raises ServeError 429 or 503 with Retry-After."""
        held = self._by_tenant[tenant]
        if held + num_requests > self.max_per_tenant:
            raise overloaded(
                f"You have {held} requests under way and ask for {num_requests} more; "
                f"the limit is {self.max_per_tenant}.",
                retry_after_s=_RETRY_AFTER_S,
                tenant=True,
            )
        if self.num_admitted + num_requests > self.max_total:
            raise overloaded(
                f"The server has {self.num_admitted} requests under way; "
                f"the limit is {self.max_total}.",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._by_tenant[tenant] += num_requests
        self.num_admitted += num_requests

    def give_back(self, tenant: str, num_requests: int) -> None:
        """So many requests have ended."""
        self.num_admitted -= num_requests
        self._by_tenant[tenant] -= num_requests
        assert self._by_tenant[tenant] >= 0, "more requests ended than were admitted"
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
