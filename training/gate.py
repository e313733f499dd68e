"""The quality gate: does an artifact answer as the adapter does, on rows that neither learned from?

Both are run layer by layer in fp32: the NF4 base with the adapter over it, as PEFT runs it, and the
weights that the artifact's 4-bit codes stand for. So a 7B model needs the memory of two layers.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import filterfalse
from pathlib import Path
from typing import Any

import torch

from server.quant import nf4
from training.merge_adapter import MergeAdapter
from training.merge_checkpoint import Checkpoint, is_buffer
from training.merge_drift import DriftMeter, Probe
from training.merge_pass import by_layer
from training.quantize_groups import linear_names
from training.quantize_packed import PackedCheckpoint
from training.render import Example

MAX_ROWS = 64
MAX_TOKENS = 512  # of a row
_HEAD_POSITIONS = 32  # whose logits are in memory together, in double precision

OnLayer = Callable[[int, int], None]  # layers done, layers in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What an artifact must hold to pass, each over the learned tokens of the held-out rows."""

    max_mean_kl: float = 0.1  # nats a token: KL(adapter path || artifact)
    min_top1_agreement: float = 0.9  # share of tokens with the same most likely one
    max_loss_increase: float = 0.1  # share of the adapter path's loss
    loss_slack: float = 0.02  # nats by which the loss may grow in any case

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"the gate's {each.name} is {value}; it must be 0 or more")
        if self.min_top1_agreement > 1:
            raise ValueError(f"the gate's min_top1_agreement is {self.min_top1_agreement}, over 1")

    @staticmethod
    def from_settings(settings: Mapping[str, float]) -> "Thresholds":
        """Some of them by name, the rest by default. ValueError for a name that is none."""
        known = {each.name for each in fields(Thresholds)}
        for name in settings:
            if name not in known:
                names = ", ".join(sorted(known))
                raise ValueError(f"the gate has no threshold {name!r}; it has {names}")
        return Thresholds(**{name: float(value) for name, value in settings.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured, over the learned tokens of the held-out rows."""

    num_rows: int
    num_tokens: int
    mean_kl: float  # KL(adapter path || artifact), nats a token
    max_kl: float
    top1_agreement: float
    adapter_loss: float  # nats a token
    artifact_loss: float

    @property
    def loss_increase(self) -> float:
        """Nats a token; below 0 where the artifact is the better one."""
        return self.artifact_loss - self.adapter_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """Figures beside thresholds."""

    figures: Figures
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def failures(self) -> list[str]:
        """What was missed, and by how much."""
        figures, limits = self.figures, self.thresholds
        allowed = max(limits.max_loss_increase * figures.adapter_loss, limits.loss_slack)
        missed = []
        if not figures.mean_kl <= limits.max_mean_kl:
            over = figures.mean_kl - limits.max_mean_kl
            missed.append(
                f"mean KL is {figures.mean_kl:.4f} nats a token, {over:.4f} over "
                f"{limits.max_mean_kl:g}"
            )
        if not figures.top1_agreement >= limits.min_top1_agreement:
            under = limits.min_top1_agreement - figures.top1_agreement
            missed.append(
                f"the most likely token is the same at {figures.top1_agreement:.1%} of positions, "
                f"{under:.1%} under {limits.min_top1_agreement:.1%}"
            )
        if not figures.loss_increase <= allowed:
            missed.append(
                f"the loss is {figures.artifact_loss:.4f} and the adapter path's "
                f"{figures.adapter_loss:.4f}: {figures.loss_increase:.4f} more, "
                f"{figures.loss_increase - allowed:.4f} over the {allowed:.4f} allowed"
            )
        return missed

    @property
    def passed(self) -> bool:
        """Whether every threshold was held; NaN holds none."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """As provenance and a promotion's state hold it."""
        return {
            "passed": self.passed,
            "failures": self.failures,
            "figures": asdict(self.figures),
            "thresholds": asdict(self.thresholds),
        }


def run_gate(
    base: Path,
    adapter: MergeAdapter,
    artifact: Path,
    examples: Sequence[Example],
    *,
    device: torch.device,
    on_layer: OnLayer = lambda done, of: None,
) -> Figures:
    """Run the examples through both and compare. ValueError where nothing can be compared on."""
    rows = [example.cut(MAX_TOKENS) for example in examples]
    rows = [row for row in rows if row.num_learned][:MAX_ROWS]
    if not rows:
        raise ValueError("the gate needs held-out rows with something to learn in them")
    packed = PackedCheckpoint(artifact)
    with contextlib.closing(Checkpoint(base)) as source:
        probes = [Probe(f"row {index}", list(row.ids)) for index, row in enumerate(rows)]
        meter = DriftMeter(source, probes, device)
        _run_layers(source, adapter, packed, meter, device, on_layer)
        return _figures(meter, rows)


@torch.inference_mode()
def _run_layers(
    source: Checkpoint,
    adapter: MergeAdapter,
    packed: PackedCheckpoint,
    meter: DriftMeter,
    device: torch.device,
    on_layer: OnLayer,
) -> None:
    """Fill both sides of the meter with one layer after the other, and run it."""
    linears = set(linear_names(source))
    num_layers = 1 + max(int(name.split(".")[2]) for name in linears)
    for layer, (prefix, names) in enumerate(by_layer(source, num_layers).items()):
        loras = {}
        for name in filterfalse(is_buffer, names):
            module, short = name.removesuffix(".weight"), name.removeprefix(prefix)
            stored = source.tensor(name).to(device)
            if module in linears:
                meter.set_unmerged(short, nf4.quantize(stored).dequantize(torch.float32))
                meter.set_merged(short, packed.weight(module))
                lora = adapter.lora(module, device)
                if lora is not None:
                    loras[short.removesuffix(".weight")] = lora
            else:
                meter.set_unmerged(short, stored)
                meter.set_merged(short, packed.tensor(name))
        meter.run_layer(loras)
        on_layer(layer + 1, num_layers)


@torch.inference_mode()
def _figures(meter: DriftMeter, rows: Sequence[Example]) -> Figures:
    head = meter.head()
    parts = [
        compare(unmerged, merged, row, head)
        for (unmerged, merged), row in zip(meter.final_states(), rows, strict=True)
    ]
    kl, agrees, adapter_loss, artifact_loss = (torch.cat(each) for each in zip(*parts, strict=True))
    return Figures(
        num_rows=len(rows),
        num_tokens=len(kl),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1_agreement=float(agrees.mean()),
        adapter_loss=float(adapter_loss.mean()),
        artifact_loss=float(artifact_loss.mean()),
    )


def compare(
    adapter: torch.Tensor, artifact: torch.Tensor, row: Example, head: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """At each learned token of a row: KL, same top token or not, and the loss of either path.

    adapter, artifact  [num_tokens, hidden] fp32, normed
    head               [vocab, hidden] fp32
    returns            4 x [num_learned] double; KL and losses in nats
    """
    learned = torch.tensor(row.is_learned[1:], device=head.device)  # each is predicted one before
    targets = torch.tensor(row.ids[1:], device=head.device)[learned]
    sides = [states[:-1][learned] for states in (adapter, artifact)]
    found = []
    for at in range(0, len(targets), _HEAD_POSITIONS):
        p, q = (
            (states[at : at + _HEAD_POSITIONS] @ head.T).double().log_softmax(dim=-1)
            for states in sides
        )
        wanted = targets[at : at + _HEAD_POSITIONS].unsqueeze(1)
        found.append(
            torch.stack(
                [
                    (p.exp() * (p - q)).sum(dim=-1).clamp_min(0),
                    (p.argmax(dim=-1) == q.argmax(dim=-1)).double(),
                    -p.gather(1, wanted).squeeze(1),
                    -q.gather(1, wanted).squeeze(1),
                ]
            )
        )
    return tuple(torch.cat(found, dim=1).cpu())
