"""The interpreter's own pauses, kept out of what streams wait for."""

import gc
import sys

_SWITCH_INTERVAL_S = 2e-4  # how long another thread may keep the interpreter once it is wanted


def settle_heap() -> None:
    """Keep the garbage collector from walking what start-up has left, which stays for good.

    A full collection of it takes over 100 ms, in which no stream moves.
    """
    gc.collect()
    gc.freeze()


def settle() -> None:
    """Call in the engine's process once everything is loaded.

    The adapter loader, which runs Python too, then gives way to the step loop sooner than after
    the usual 5 ms, which is longer than a step takes on a GPU.
    """
    settle_heap()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
