"""What the host-side halves of the GPU's step buffers share."""

from itertools import cycle

import numpy as np
import torch

_BUFFERS = 3  # the copy of an earlier step may be under way while the next one is filled in


class HostBuffers:
    """Host memory that a step is written to before it is copied to the device: several, in turn.

    Pinned for a GPU: only from pinned memory is a copy queued without waiting.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._turns = cycle(
            [
                torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
                for _ in range(_BUFFERS)
            ]
        )

    def next(self) -> torch.Tensor:
        """The one that is due; int32, and it holds what an earlier step left there."""
        return next(self._turns)


def positions(repeats: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each of `repeats` in turn, end to end."""
    starts: np.ndarray = np.repeat(np.cumsum(repeats) - repeats, repeats)
    found: np.ndarray = np.arange(len(starts)) - starts
    return found
