"""What a layer's forward pass leaves for its backward pass: on the device, or in host memory."""

from collections import deque
from collections.abc import Collection

import torch

Kept = dict[str, torch.Tensor]


class Keeper:
    """Holds each layer's tensors from its forward to its backward pass.

    In host memory, they leave on a stream of their own while the next layer runs. They come back
    on it in two parts: what the MLP's backward pass needs while the layer behind is at its
    attention, and the rest meanwhile. So never more than a layer's are on the device.
    """

    def __init__(self, num_layers: int, device: torch.device, *, on_host: bool) -> None:
        self._last = num_layers - 1
        self._on_host = on_host and device.type == "cuda"
        self._held: dict[int, Kept] = {}
        if self._on_host:
            self._stream = torch.cuda.Stream(device)
            self._memory: dict[tuple[int, str], torch.Tensor] = {}  # pinned bytes, used every step
            self._away: dict[int, Kept] = {}  # views of `_memory`
            self._leaving: deque[tuple[torch.cuda.Event, Kept]] = deque()
            self._coming: dict[int, tuple[torch.cuda.Event, Kept]] = {}

    def put(self, layer: int, tensors: Kept) -> None:
        """Keep them. The caller changes them no more."""
        if not self._on_host or layer == self._last:  # whose backward pass comes at once
            self._held[layer] = tensors
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._away[layer] = {
                name: self._host(layer, name, tensor).copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()
            }
            self._leaving.append((self._stream.record_event(), tensors))
        self._let_go(1)

    def fetch(self, layer: int, names: Collection[str] | None = None) -> None:
        """Begin to bring a layer's tensors back, or those of these names."""
        if layer < 0 or layer in self._held or not self._on_host:
            return
        away = self._away[layer]
        wanted = [name for name in away if names is None or name in names]
        self._let_go(0)
        near = {name: torch.empty_like(away[name], device=self._stream.device) for name in wanted}
        self._stream.wait_stream(torch.cuda.current_stream())  # whose memory it was before
        with torch.cuda.stream(self._stream):
            for name, tensor in near.items():
                tensor.copy_(away.pop(name), non_blocking=True)
            self._coming[layer] = self._stream.record_event(), near

    def take(self, layer: int, names: Collection[str] | None = None) -> Kept:
        """A layer's tensors, or those of these names, which are kept no more."""
        if layer in self._held:
            held = self._held[layer]
            found = {name: held.pop(name) for name in list(held) if names is None or name in names}
            if not held:
                del self._held[layer]
            return found
        if layer not in self._coming:
            self.fetch(layer, names)
        event, found = self._coming.pop(layer)
        torch.cuda.current_stream().wait_event(event)
        return found

    def clear(self) -> None:
        """Drop what a step that broke off has left."""
        self._held.clear()
        if self._on_host:
            self._let_go(0)
            self._away.clear()
            self._coming.clear()

    def _let_go(self, num_left: int) -> None:
        """Free device memory whose copies are done before the current stream goes on."""
        while len(self._leaving) > num_left:
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)

    def _host(self, layer: int, name: str, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory of this shape; it grows with the largest batch."""
        memory = self._memory.get((layer, name))
        if memory is None or memory.numel() < like.nbytes:
            self._memory[layer, name] = memory = _pinned(like.nbytes)
        return memory[: like.nbytes].view(like.dtype).view(like.shape)


def _pinned(num_bytes: int) -> torch.Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise ValueError(
            f"no room in host memory for {num_bytes:,} more bytes of what layers keep for their "
            f"backward pass ({error}); lower micro_batch, or set kernels to 'reference'"
        ) from None
