"""Which adapters a merged model in the engine answers for."""

from pathlib import Path

from server.api.ports import Engine
from server.errors import WeightSetRefused


class MergedRoutes:
    """Adapter revisions to weight sets, as long as the engine process that loaded them lives."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._routes: dict[str, tuple[str, int]] = {}  # adapter -> artifact, engine's number

    async def load(self, adapter_digest: str, artifact_digest: str, folder: Path) -> None:
        """Load the checkpoint and route to it from then on.

        Raises WeightSetRefused where it cannot be had, ServeError 503 without an engine.
        """
        number = self._engine.num_restarts
        event = await self._engine.load_weight_set(artifact_digest, folder)
        if event.event != "loaded":
            raise WeightSetRefused(event.message)
        self._routes[adapter_digest] = artifact_digest, number

    async def unload(self, adapter_digest: str) -> None:
        """Route to the adapter path from now on; returns when the memory is free."""
        artifact = self.route(adapter_digest)
        self._routes.pop(adapter_digest, None)
        if artifact is not None and artifact not in map(self.route, self._routes):
            await self._engine.drop_weight_set(artifact)

    def route(self, adapter_digest: str) -> str | None:
        """The weight set that answers for it now; None: the adapter path."""
        artifact, number = self._routes.get(adapter_digest, (None, -1))
        return artifact if number == self._engine.num_restarts else None
