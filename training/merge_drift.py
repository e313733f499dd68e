"""What a merge loses: the merged model's logits beside transformers + PEFT's, layer by layer.

Both models are one fp32 decoder layer each, filled with layer after layer while the merge has them
in hand, so that a 7B model needs no more memory here than one of its layers takes twice. The
unmerged side is PEFT's own forward pass over the merge base; the merged side is the output's
weights, cast as they are written.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoModel, AutoTokenizer

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional hub kernel
from peft import LoraConfig, LoraModel  # noqa: E402  # imports bitsandbytes: after it is quiet
from peft.helpers import DoraCaching  # noqa: E402

from training.merge_adapter import Lora  # noqa: E402
from training.merge_checkpoint import Checkpoint  # noqa: E402

MAX_PROBE_TOKENS = 256
MAX_PROBES = 64
_HEAD_POSITIONS = 32  # whose logits are in memory together, in double precision
_PEFT_NAME = "probe"
_SIDES = ("unmerged", "merged")
CONVERSATIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three colours.", "Red, green and blue."),
    ("Write a short sentence about trains.", "The last train left the station at midnight."),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it down."),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A text whose every next-token distribution is compared."""

    name: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far the merged model's next-token distributions are from the unmerged one's."""

    probe: str
    num_tokens: int
    mean_kl: float  # KL(unmerged || merged) in nats, mean over the positions
    max_kl: float
    top1_agreement: float  # share of positions with the same most likely token


def read_probes(folder: Path, file: Path | None, vocab_size: int) -> list[Probe]:
    """Tokenize the texts of `file`, blank lines between them, or the built-in conversations.

    Where the checkpoint in `folder` has no tokenizer, the built-in probes are random token ids.
    """
    tokenizer: Any = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if file is not None:
        if tokenizer is None:
            raise ValueError(f"--probe is {str(file)!r}, but the base has no tokenizer to read it")
        texts = [text.strip() for text in _paragraphs(file.read_text(encoding="utf-8"))]
        probes = [_probe(text, tokenizer(text)["input_ids"]) for text in texts]
        probes = [probe for probe in probes if probe.token_ids]
        if not probes:
            raise ValueError(f"--probe is {str(file)!r}; it holds no text")
        return probes[:MAX_PROBES]
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (4, 32), generator=generator).tolist()
        return [Probe(f"random tokens {index}", row) for index, row in enumerate(ids)]
    return [_conversation(tokenizer, *turns) for turns in CONVERSATIONS]


class DriftMeter:
    """Runs the probes through both models as their layers come by, the first layer first.

    For each layer fill both sides with `set_unmerged` and `set_merged`, then call `run_layer`;
    after the last one ask for the `drifts`.
    """

    def __init__(self, checkpoint: Checkpoint, probes: list[Probe], device: torch.device) -> None:
        self._checkpoint, self._probes, self._device = checkpoint, probes, device
        self._models = {side: _one_layer(checkpoint.folder, device) for side in _SIDES}
        embedded = [self._embed(probe) for probe in probes]
        self._hidden = {side: list(embedded) for side in _SIDES}  # each [1, num_tokens, hidden]

    def set_unmerged(self, name: str, weight: torch.Tensor) -> None:
        """Fill a parameter of the layer, say `mlp.up_proj.weight`, with the merge base's values."""
        _set(self._models["unmerged"], name, weight)

    def set_merged(self, name: str, weight: torch.Tensor) -> None:
        """Fill a parameter of the layer with what the output holds."""
        _set(self._models["merged"], name, weight)

    @torch.inference_mode()
    def run_layer(self, loras: Mapping[str, Lora]) -> None:
        """Move the probes through this layer. `loras` are by linear: `mlp.up_proj`."""
        self._advance("merged")
        with _with_peft(self._models["unmerged"], loras, self._device), DoraCaching():
            self._advance("unmerged")

    @torch.inference_mode()
    def drifts(self) -> list[Drift]:
        """One for each probe, then one over all of them, called `all`."""
        states = self.final_states()
        head = self.head()
        rows = [_compare(unmerged, merged, head) for unmerged, merged in states]
        every_kl, every_agree = (torch.cat([row[part] for row in rows]) for part in (0, 1))
        drifts = [_drift(probe.name, *row) for probe, row in zip(self._probes, rows, strict=True)]
        return [*drifts, _drift("all", every_kl, every_agree)]

    @torch.inference_mode()
    def final_states(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """After the last layer: what of each probe the head sees, of the unmerged and the merged.

        Each is [num_tokens, hidden] fp32, normed. The layers' room is given up.
        """
        self._models.clear()  # the head may need it
        pairs = zip(*(self._hidden[side] for side in _SIDES), strict=True)
        return [(self._norm(unmerged[0]), self._norm(merged[0])) for unmerged, merged in pairs]

    def head(self) -> torch.Tensor:
        """The head of either model: [vocab, hidden] fp32."""
        tied = "lm_head.weight" not in self._checkpoint or _config(self._checkpoint.folder).get(
            "tie_word_embeddings"
        )
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return self._checkpoint.tensor(name).to(self._device).float()

    def _advance(self, side: str) -> None:
        model, hidden = self._models[side], self._hidden[side]
        for index, states in enumerate(hidden):
            hidden[index] = model(inputs_embeds=states, use_cache=False).last_hidden_state

    def _embed(self, probe: Probe) -> torch.Tensor:
        rows = [
            self._checkpoint.rows("model.embed_tokens.weight", token_id, 1)
            for token_id in probe.token_ids
        ]
        return torch.cat(rows).to(self._device).float().unsqueeze(0)

    def _norm(self, states: torch.Tensor) -> torch.Tensor:
        """The model's last RMSNorm: [num_tokens, hidden] -> the same."""
        weight = self._checkpoint.tensor("model.norm.weight").to(self._device).float()
        eps = _config(self._checkpoint.folder)["rms_norm_eps"]
        return torch.nn.functional.rms_norm(states, weight.shape, weight, eps)


def _one_layer(folder: Path, device: torch.device) -> Any:
    """A model of the base's kind with one decoder layer, no vocabulary and no last norm, fp32."""
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    with torch.device("meta"):  # each layer fills it, so nothing need be drawn at random
        model = AutoModel.from_config(config, dtype=torch.float32)
    model.norm = torch.nn.Identity()
    model.to_empty(device=device)
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    return model.eval()


@torch.inference_mode()
def _set(model: Any, name: str, weight: torch.Tensor) -> None:
    parameter = dict(model.layers[0].named_parameters()).get(name)
    if parameter is not None:  # old checkpoints hold buffers too, which follow from the config
        parameter.copy_(weight)


@contextlib.contextmanager
def _with_peft(model: Any, loras: Mapping[str, Lora], device: torch.device) -> Iterator[None]:
    """Put PEFT's LoRA layers onto the layer's linears, and take them off again."""
    if not loras:
        yield
        return
    names = {f"layers.0.{linear}": lora for linear, lora in loras.items()}
    config = LoraConfig(
        target_modules=list(names),
        rank_pattern={name: lora.rank for name, lora in names.items()},
        alpha_pattern={name: lora.scaling * lora.rank for name, lora in names.items()},
        use_dora=any(lora.magnitude is not None for lora in loras.values()),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        tuner = LoraModel(model, config, _PEFT_NAME)
    tuner.to(device).eval()
    for name, lora in names.items():
        module = model.get_submodule(name)
        module.lora_A[_PEFT_NAME].weight.copy_(lora.lora_a)
        module.lora_B[_PEFT_NAME].weight.copy_(lora.lora_b)
        if lora.magnitude is not None:
            module.lora_magnitude_vector[_PEFT_NAME].weight.copy_(lora.magnitude)
    try:
        yield
    finally:
        tuner.unload()


def _compare(
    unmerged: torch.Tensor, merged: torch.Tensor, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each position in nats, and whether both have the same most likely token.

    unmerged, merged  [num_tokens, hidden] fp32, normed
    head              [vocab, hidden] fp32
    returns           [num_tokens] double, [num_tokens] bool
    """
    kls, agrees = [], []
    for at in range(0, len(unmerged), _HEAD_POSITIONS):
        p, q = (
            (states[at : at + _HEAD_POSITIONS] @ head.T).double().log_softmax(dim=-1)
            for states in (unmerged, merged)
        )
        kls.append((p.exp() * (p - q)).sum(dim=-1).clamp_min(0))
        agrees.append(p.argmax(dim=-1) == q.argmax(dim=-1))
    return torch.cat(kls).cpu(), torch.cat(agrees).cpu()


def _drift(name: str, kls: torch.Tensor, agrees: torch.Tensor) -> Drift:
    return Drift(
        probe=name,
        num_tokens=len(kls),
        mean_kl=float(kls.mean()),
        max_kl=float(kls.max()),
        top1_agreement=float(agrees.double().mean()),
    )


def _conversation(tokenizer: Any, question: str, answer: str) -> Probe:
    """A question and its answer as the chat template writes them; plain text without one."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    with contextlib.suppress(TemplateError):
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            return _probe(question, tokenizer(text, add_special_tokens=False)["input_ids"])
    return _probe(question, tokenizer(f"{question}\n{answer}")["input_ids"])


def _probe(text: str, token_ids: list[int]) -> Probe:
    name = " ".join(text.split())
    return Probe(name if len(name) <= 48 else f"{name[:47]}…", token_ids[:MAX_PROBE_TOKENS])


def _paragraphs(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n\n")


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
