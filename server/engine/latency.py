"""The interpreter's own pauses, kept out of the step loop."""

import gc
import sys

_SWITCH_INTERVAL_S = 2e-4  # how long another thread may keep the interpreter once it is wanted


def settle() -> None:
    """Call once everything is loaded: what is there by then is never looked through for garbage.

    And the adapter loader, which runs Python too, gives way to the step loop sooner than after
    the usual 5 ms, which is longer than a step takes on a GPU.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
