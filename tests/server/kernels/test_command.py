"""`python -m server.kernels` where there is nothing to measure."""

import pytest
import torch

from server.kernels.__main__ import main


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures a GPU, and torch finds none here"):
        main()
