"""What every row of a step asks of the sampler, as its kernel reads it."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from server.kernels.staging import HostBuffers

NO_STATE_ROW = -1  # of a padding row

# One row's record. The kernel reads it as 32-bit words in this order.
ROW = np.dtype(
    [
        ("state_row", np.int32),  # or NO_STATE_ROW
        ("temperature", np.float32),  # 0 is greedy
        ("log_min_p", np.float32),  # -inf is off
        ("top_k", np.int32),  # 0 is off; below the vocabulary's size
        ("top_p", np.float32),  # 1 is off
        ("draw", np.uint32),  # its random number in [0, 1), times 2**32
        ("is_penalized", np.int32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("first_bias", np.int32),  # filled in by SamplerGpuStep
        ("num_biases", np.int32),
    ]
)
BIAS = np.dtype([("token_id", np.int32), ("bias", np.float32)])  # to add to one token's logit
ROW_WORDS, BIAS_WORDS = ROW.itemsize // 4, BIAS.itemsize // 4


class SamplerGpuStep:
    """The records of one step's rows, then their biases, where the kernel reads them.

    Filling it changes no address.

    rows    [max_rows, ROW_WORDS]      int32, one ROW each
    biases  [max_biases, BIAS_WORDS]   int32, one BIAS each; a row's own lie end to end
    """

    def __init__(self, *, max_rows: int, max_biases: int, device: torch.device) -> None:
        self.max_rows, self.max_biases = max_rows, max_biases
        self.num_rows = 0  # of the last fill
        num_row_words = max_rows * ROW_WORDS
        num_words = num_row_words + max_biases * BIAS_WORDS
        self._buffer = torch.full((num_words,), NO_STATE_ROW, dtype=torch.int32, device=device)
        self.rows = self._buffer[:num_row_words].view(max_rows, ROW_WORDS)
        self.biases = self._buffer[num_row_words:].view(max_biases, BIAS_WORDS)
        self._host_buffers = HostBuffers((num_words,), device)
        self._filled_with = (b"", b"")

    def fill(
        self,
        rows: npt.NDArray[np.void],
        biases: Mapping[int, npt.NDArray[np.void]],
        num_rows: int,
    ) -> None:
        """Describe the next step; the copy to the device is queued on the current stream.

        A step like the one before it, as greedy decode steps are, is not copied again.

        rows      [len <= num_rows] ROW; the rows up to num_rows are padding
        biases    index in `rows` to BIAS array, for the rows that have any; a token once a row
        num_rows  how many rows the kernel will look at
        """
        assert len(rows) <= num_rows <= self.max_rows, "too many rows for this step"
        padded = np.zeros(num_rows, ROW)
        padded["state_row"] = NO_STATE_ROW
        padded[: len(rows)] = rows
        together = np.empty(0, np.int32)
        if biases:
            lengths = np.array([len(own) for own in biases.values()])
            padded["num_biases"][list(biases)] = lengths
            padded["first_bias"][list(biases)] = lengths.cumsum() - lengths
            together = np.concatenate([own.view(np.int32) for own in biases.values()])
        num_biases = len(together) // BIAS_WORDS
        assert num_biases <= self.max_biases, f"{num_biases} biases; the limit is {self.max_biases}"
        self.num_rows = num_rows
        content = (padded.tobytes(), together.tobytes())
        if content != self._filled_with:
            self._filled_with = content
            self._copy(padded.view(np.int32), together)

    def _copy(self, rows: npt.NDArray[np.int32], biases: npt.NDArray[np.int32]) -> None:
        host = self._host_buffers.next()
        words = host.numpy()
        words[: len(rows)] = rows
        end = len(rows)
        if len(biases):
            first = self.rows.numel()
            end = first + len(biases)
            words[first:end] = biases
        self._buffer[:end].copy_(host[:end], non_blocking=True)
        self._host_buffers.sent()
