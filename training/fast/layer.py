"""One decoder layer, forward and backward, written out."""

from dataclasses import dataclass
from typing import Any

import torch

from training.fast.attention import Attention
from training.fast.keeper import Keeper, Kept
from training.fast.linears import Group, Workspace, roomy, with_room
from training.fast.ops import Ops

# What a layer may keep besides its input, in the order in which the backward pass would miss it.
CHOICES = ("attended", "middle", "qkv", "gate_up")
_OF_MLP = ("middle", "gate_up")


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of one forward and backward pass share."""

    cos: torch.Tensor  # [num_tokens, head_size] fp32
    sin: torch.Tensor
    attention: Attention
    keep: frozenset[str]  # of CHOICES; the rest is computed again
    keeper: Keeper | None  # None: no backward pass follows
    space: Workspace

    @property
    def ops(self) -> Ops:
        """Norm, rotation, gate."""
        return self.space.ops


class Layer:
    """Frozen weights and LoRA of one Mistral or Llama layer."""

    def __init__(self, module: Any, index: int) -> None:
        attn, mlp = module.self_attn, module.mlp
        self.index = index
        self.qkv = Group((attn.q_proj, attn.k_proj, attn.v_proj))
        self.o = Group((attn.o_proj,))
        self.gate_up = Group((mlp.gate_proj, mlp.up_proj), is_widest=True)
        self.down = Group((mlp.down_proj,))
        self._norms = [
            (norm.weight.detach(), float(norm.variance_epsilon))
            for norm in (module.input_layernorm, module.post_attention_layernorm)
        ]
        self._head_size = int(attn.head_dim)
        self._sizes = [part.weight.shape[0] for part in self.qkv.parts]

    @property
    def groups(self) -> list[Group]:
        """In the order of `gradients`."""
        return [self.qkv, self.o, self.gate_up, self.down]

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return [parameter for group in self.groups for parameter in group.parameters()]

    def forward(self, x: torch.Tensor, state: Pass) -> tuple[torch.Tensor, Kept]:
        """The layer's output, and what its backward pass is to have: x [num_tokens, hidden]."""
        qkv = self._qkv(x, state)
        attended, log_sums = state.attention.forward(*self._heads(qkv))
        middle = self._middle(x, attended, state)
        gate_up = self._gate_up(middle, state)
        h = roomy(x, self.down.in_features, self.down)
        state.ops.gate(gate_up[:, : self.gate_up.out_features], h[:, : self.down.in_features])
        matrix = state.space.matrix(self.down)
        self.down.shrink(matrix, h)
        kept = {"attended": attended, "middle": middle, "qkv": qkv, "gate_up": gate_up}
        kept = {name: tensor for name, tensor in kept.items() if name in state.keep}
        if "attended" in kept:
            kept["log_sums"] = log_sums
        return self.down.forward(matrix, h, residual=middle), {"x": x, **kept}

    def backward(self, d_out: torch.Tensor, state: Pass) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of x and of `parameters()`; what was not kept is computed again."""
        keeper = state.keeper
        assert keeper is not None
        kept = {}
        if "middle" in state.keep:
            kept = keeper.take(self.index, _OF_MLP)
            keeper.fetch(self.index)  # the rest, while the MLP's backward pass runs
            middle = kept["middle"]
        else:
            kept = keeper.take(self.index)
            self._attend_again(kept, state)
            middle = self._middle(kept["x"], kept["attended"], state)
        d_middle, mlp_gradients = self._mlp_backward(
            d_out, middle, kept.pop("gate_up", None), state
        )
        if "middle" in state.keep:
            kept = keeper.take(self.index)
            self._attend_again(kept, state)
        del middle
        keeper.fetch(self.index - 1, _OF_MLP if "middle" in state.keep else None)
        d_attended, o_gradients = self._o_backward(d_middle, kept["attended"], state)
        d_x, qkv_gradients = self._attention_backward(d_attended, d_middle, kept, state)
        return d_x, qkv_gradients + o_gradients + mlp_gradients

    def _attend_again(self, kept: Kept, state: Pass) -> None:
        """Put what attention gave into `kept`, unless it is there."""
        if "attended" not in kept:
            if "qkv" not in kept:
                kept["qkv"] = self._qkv(kept["x"], state)
            heads = self._heads(kept["qkv"])
            kept["attended"], kept["log_sums"] = state.attention.forward(*heads)

    def _normed(self, x: torch.Tensor, which: int, group: Group, state: Pass) -> torch.Tensor:
        """The norm of x as the input of a group, its h beside it."""
        normed = roomy(x, group.in_features, group)
        weight, eps = self._norms[which]
        state.ops.rms_norm(x, weight, eps, normed[:, : group.in_features])
        group.shrink(state.space.matrix(group), normed)
        return normed

    def _qkv(self, x: torch.Tensor, state: Pass) -> torch.Tensor:
        """q, k (both rotated) and v side by side."""
        return self._rotated(self._normed(x, 0, self.qkv, state), state)

    def _rotated(self, normed: torch.Tensor, state: Pass) -> torch.Tensor:
        qkv = self.qkv.forward(state.space.matrix(self.qkv), normed)
        rotated = qkv[:, : -self._sizes[2]]
        state.ops.rotate(rotated, state.cos, state.sin, 1.0, rotated)
        return qkv

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as [num_tokens, heads, head_size] each: views."""
        parts = qkv.split(self._sizes, dim=1)
        q, k, v = (part.unflatten(1, (-1, self._head_size)) for part in parts)
        return q, k, v

    def _attended(self, attended: torch.Tensor, state: Pass) -> torch.Tensor:
        """The input of o, its h beside it."""
        x = roomy(attended, self.o.in_features, self.o)
        x[:, : self.o.in_features] = attended.flatten(1)
        self.o.shrink(state.space.matrix(self.o), x)
        return x

    def _middle(self, x: torch.Tensor, attended: torch.Tensor, state: Pass) -> torch.Tensor:
        """x plus what attention adds."""
        matrix = state.space.matrix(self.o)
        return self.o.forward(matrix, self._attended(attended, state), residual=x)

    def _gate_up(
        self, middle: torch.Tensor, state: Pass, normed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """gate and up side by side, with room for g."""
        if normed is None:
            normed = self._normed(middle, 1, self.gate_up, state)
        gate_up = roomy(middle, self.gate_up.out_features, self.gate_up)
        matrix = state.space.matrix(self.gate_up)
        self.gate_up.forward(matrix, normed, out=gate_up[:, : self.gate_up.out_features])
        return gate_up

    def _mlp_backward(
        self,
        d_out: torch.Tensor,
        middle: torch.Tensor,
        gate_up: torch.Tensor | None,
        state: Pass,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradient of `middle`, with room for o's g, and those of gate, up and down."""
        normed = self._normed(middle, 1, self.gate_up, state)
        if gate_up is None:
            gate_up = self._gate_up(middle, state, normed)
        dy = with_room(d_out, self.down)
        matrix = state.space.matrix(self.down)
        h = roomy(d_out, self.down.in_features, self.down)
        d_h = h[:, : self.down.in_features]
        self.down.backward(matrix, dy, out=d_h)
        # One pass over both: gate_up becomes its own gradient, and d_h becomes h.
        state.ops.gate_backward(gate_up[:, : self.gate_up.out_features], d_h)
        self.down.shrink(matrix, h)
        down_gradients = self.down.gradients(dy, h)
        del h, d_h, dy
        d_normed = self.gate_up.backward(state.space.matrix(self.gate_up), gate_up)
        gradients = self.gate_up.gradients(gate_up, normed) + down_gradients
        del gate_up, normed
        d_middle = roomy(d_out, self.o.out_features, self.o)
        weight, eps = self._norms[1]
        state.ops.rms_norm_backward(
            d_normed, middle, weight, eps, d_out, d_middle[:, : self.o.out_features]
        )
        return d_middle, gradients

    def _o_backward(
        self, d_middle: torch.Tensor, attended: torch.Tensor, state: Pass
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradient of what attention gave, as `attended`, and those of o."""
        matrix = state.space.matrix(self.o)
        d_attended = self.o.backward(matrix, d_middle)
        x = attended.flatten(1)
        h = torch.mm(x, matrix[self.o.out_features :, : self.o.in_features].t())
        gradients = self.o.gradients_apart(d_middle, x, h)
        return d_attended.view(attended.shape), gradients

    def _attention_backward(
        self, d_attended: torch.Tensor, d_middle: torch.Tensor, kept: Kept, state: Pass
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradients of x, and those of q, k and v."""
        x = kept["x"]
        normed = self._normed(x, 0, self.qkv, state)
        matrix = state.space.matrix(self.qkv)
        qkv = kept["qkv"] if "qkv" in kept else self._rotated(normed, state)
        found = state.attention.backward(
            d_attended, *self._heads(qkv), kept["attended"], kept["log_sums"]
        )
        d_qkv = roomy(x, self.qkv.out_features, self.qkv)
        d_q, d_k, d_v = d_qkv[:, : self.qkv.out_features].split(self._sizes, dim=1)
        state.ops.rotate(found[0].flatten(1), state.cos, state.sin, -1.0, d_q)
        state.ops.rotate(found[1].flatten(1), state.cos, state.sin, -1.0, d_k)
        d_v.copy_(found[2].flatten(1))
        del found
        d_normed = self.qkv.backward(matrix, d_qkv)
        gradients = self.qkv.gradients(d_qkv, normed)
        weight, eps = self._norms[0]
        # With room, since the layer in front takes it as the dy of its own `down`.
        d_x = roomy(x, x.shape[1], self.down)[:, : x.shape[1]]
        d_residual = d_middle[:, : self.o.out_features]
        state.ops.rms_norm_backward(d_normed, x, weight, eps, d_residual, d_x)
        return d_x, gradients


class LayerFunction(torch.autograd.Function):
    """A layer as autograd sees it: x and what is trained in, one tensor out."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, state: Pass, *_: torch.Tensor
    ) -> torch.Tensor:
        out, kept = layer.forward(x, state)
        if state.keeper is not None:
            ctx.layer, ctx.state = layer, state
            state.keeper.put(layer.index, kept)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        d_x, gradients = ctx.layer.backward(d_out, ctx.state)
        return d_x, None, None, *gradients
