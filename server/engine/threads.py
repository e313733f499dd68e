"""Threads that work beside the steps."""

import torch


def use_one_thread() -> None:
    """Keep this thread from starting OpenMP threads of its own.

    With more of them than cores libgomp stops spinning at all, and a step takes twice its time.
    """
    torch.set_num_threads(1)
