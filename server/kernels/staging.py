"""What the host-side halves of the GPU's step buffers share."""

from itertools import cycle

import numpy as np
import torch

_BUFFERS = 3  # so that filling one in seldom waits for the copy of an earlier step


class HostBuffers:
    """Host memory that a step is written to before it is copied to the device: several, in turn.

    Pinned for a GPU: only from pinned memory is a copy queued without waiting.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._turns = cycle(
            [
                (
                    torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu),
                    torch.cuda.Event() if on_gpu else None,
                )
                for _ in range(_BUFFERS)
            ]
        )
        self._copied: torch.cuda.Event | None = None

    def next(self) -> torch.Tensor:
        """The one that is due; int32, and it holds what an earlier step left there.

        Waits, should the copy from it still be under way.
        """
        buffer, self._copied = next(self._turns)
        if self._copied is not None:
            self._copied.synchronize()
        return buffer

    def sent(self) -> None:
        """The copy from the last one has been queued on the current stream."""
        if self._copied is not None:
            self._copied.record()


def positions(repeats: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each of `repeats` in turn, end to end."""
    starts: np.ndarray = np.repeat(np.cumsum(repeats) - repeats, repeats)
    found: np.ndarray = np.arange(len(starts)) - starts
    return found
