"""A step through a Mistral or Llama with LoRA by the ops written here, and no module's forward."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from training.fast import ops as plain_ops
from training.fast.attention import Attention
from training.fast.head import HeadLoss
from training.fast.keeper import Keeper
from training.fast.layer import CHOICES, Layer, LayerFunction, Pass
from training.fast.linears import Workspace
from training.packing import IGNORED, Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is fast about it; a benchmark turns them off one by one."""

    fused: bool = True  # norm, rotation and gate in Triton, not op by op
    keep: frozenset[str] = frozenset(CHOICES[:3])  # for the backward pass, besides each input
    on_host: bool = True  # kept tensors wait in host memory


class FastModel:
    """Losses of batches through `model`'s own weights; gradients go to its LoRA as ever."""

    def __init__(self, model: Any, options: Options) -> None:
        inner = model.model
        self._embed = inner.embed_tokens
        self._rotary = inner.rotary_emb
        self._norm = inner.norm
        self._head = model.lm_head.weight
        self._device = self._head.device
        self._layers = [Layer(module, index) for index, module in enumerate(inner.layers)]
        groups = [group for layer in self._layers for group in layer.groups]
        ops = plain_ops.pick(self._device, fused=options.fused)
        self._space = Workspace(groups, ops, self._head.dtype, self._device)
        self._keeper = Keeper(len(self._layers), self._device, on_host=options.on_host)
        self._keep = options.keep
        self._parameters = [layer.parameters() for layer in self._layers]

    def summed_loss(self, batch: Batch) -> torch.Tensor:
        """Sum of the learned tokens' losses, fp32: a scalar on the device, from a host's batch.

        Padding takes no part: rows become one stretch of tokens, document after document.
        """
        stretch = Stretch.of(batch, self._device)
        self._space.forget()
        self._keeper.clear()
        hidden = self._embed(batch.ids.to(self._device, non_blocking=True)).flatten(0, 1)
        if stretch.places is not None:
            hidden = hidden.index_select(0, stretch.places)
        angles = self._rotary(hidden.new_empty(0, dtype=torch.float32), stretch.positions)
        state = Pass(
            cos=angles[0][0].contiguous(),
            sin=angles[1][0].contiguous(),
            attention=Attention(stretch.lengths, self._device),
            keep=self._keep,
            keeper=self._keeper if torch.is_grad_enabled() else None,
            space=self._space,
        )
        for layer, parameters in zip(self._layers, self._parameters, strict=True):
            hidden = LayerFunction.apply(  # type: ignore[no-untyped-call]
                hidden, layer, state, *parameters
            )
        total: torch.Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden,
            stretch.learned,
            stretch.labels,
            self._norm.weight,
            float(self._norm.variance_epsilon),
            self._head,
            self._space.ops,
        )
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A batch's real tokens end to end.

    places      [num_tokens] int64      where they are in the batch's rows; None: everywhere
    positions   [1, num_tokens] int64   from 0 in each document
    learned     [num_learned] int64     the tokens that predict a label
    labels      [num_learned] int64
    """

    places: torch.Tensor | None
    positions: torch.Tensor
    learned: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]  # of the documents

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Stretch":
        """Lay the batch, which is on the host, end to end."""
        width = batch.ids.shape[1]
        used = [sum(row) for row in batch.lengths]
        lengths = tuple(itertools.chain(*batch.lengths))
        labels = batch.labels.flatten()
        places = None
        if sum(used) < batch.ids.numel():
            places = torch.cat(
                [torch.arange(i * width, i * width + count) for i, count in enumerate(used)]
            )
            labels = labels[places]
        learned = (labels != IGNORED).nonzero().flatten()
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        return cls(
            places=None if places is None else places.to(device, non_blocking=True),
            positions=positions.to(device, non_blocking=True),
            learned=learned.to(device, non_blocking=True),
            labels=labels[learned].to(device, non_blocking=True),
            lengths=lengths,
        )
