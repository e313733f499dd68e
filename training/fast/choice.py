"""Whether a run goes through the ops written here, and if not, why not."""

from dataclasses import dataclass
from typing import Any

import torch

from training.config import TrainConfig
from training.fast.layer import CHOICES
from training.fast.model import Options

_NEEDED = (8, 0)  # compute capability of torch's flash attention
_ALL_ON_DEVICE = Options(keep=frozenset(CHOICES), on_host=False)
_SOME_ON_DEVICE = Options(on_host=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the plan says, and the trainer does."""

    options: Options | None  # None: transformers' and PEFT's own modules
    why: str

    def __str__(self) -> str:
        return f"{'reference' if self.options is None else 'fast'}: {self.why}"


def choices(
    config: TrainConfig, model: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Choice, ...]:
    """What may run, by `config.kernels`, the base's configuration and the hardware.

    The fastest stands first and takes the most memory. Raises ValueError where "fast" is asked for
    and cannot be.
    """
    obstacle = _obstacle(config, model) or _lack(dtype, device)
    if config.kernels == "fast" and obstacle:
        raise ValueError(f"kernels is 'fast', but {obstacle}; 'auto' takes what goes")
    if config.kernels == "reference":
        return (Choice(None, "asked for"),)
    if config.kernels == "auto" and device.type != "cuda":
        return (Choice(None, "there is no GPU"),)
    if obstacle:
        return (Choice(None, obstacle),)
    wanted = config.gradient_checkpointing
    near = [Choice(_ALL_ON_DEVICE, "nothing is computed again")] if not wanted else []
    if wanted is None:
        near.append(Choice(_SOME_ON_DEVICE, "gate and up are computed again"))
    if wanted is False:
        return tuple(near)
    why = "gate and up are computed again, what else layers keep waits in host memory"
    return (*near, Choice(Options(), why))


def _obstacle(config: TrainConfig, model: Any) -> str | None:
    """What of the run the fast ops do not know."""
    if config.dropout:
        return f"dropout is {config.dropout:g}"
    if config.use_dora:
        return "use_dora is set"
    if model.hidden_act != "silu":
        return f"the base's activation is {model.hidden_act}"
    if getattr(model, "attention_bias", False) or getattr(model, "mlp_bias", False):
        return "the base's linears have biases"
    window = getattr(model, "sliding_window", None)
    if window and window < config.max_length:
        return f"the base's sliding window of {window} is narrower than max_length"
    return None


def _lack(dtype: torch.dtype, device: torch.device) -> str | None:
    """What the hardware does not do."""
    if device.type != "cuda":
        return None
    if dtype == torch.float32:
        return "dtype is fp32, and flash attention needs 16 bits"
    capability = torch.cuda.get_device_capability(device)
    if capability < _NEEDED:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, not 8.0 or more"
    return None
