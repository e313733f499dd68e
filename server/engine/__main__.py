"""`python -m server.engine ENDPOINT PARENT_PID`: the engine process; its stdin is the config."""

from collections.abc import Callable
from typing import Any

import torch


def _uncompiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return function


# bitsandbytes decorates functions with it that are not called here, and with its first use comes
# a compiler that takes longer to import than everything else together.
torch.compile = _uncompiled  # type: ignore[assignment]

from server.engine.process import main  # noqa: E402  # which imports bitsandbytes

if __name__ == "__main__":
    main()
