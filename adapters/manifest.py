"""What an adapter is: the base it fits, its limits, and the manifest that says what it does."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

FORMAT = 1  # of the manifest and of the stored object; part of the digest
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class AdapterError(ValueError):
    """Anything that an operator or a client did wrong with an adapter."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AdapterRefused(AdapterError):
    """The adapter cannot be served; `field` is the config field, tensor, file or limit at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class AdapterNotFound(AdapterError):
    """No adapter or revision has this name, or a file of it is missing."""


class AdapterLost(AdapterNotFound):
    """A revision is registered, and somebody took its object out of the store."""


class AdapterConflict(AdapterError):
    """The request contradicts what is registered already."""


class StoreBusy(AdapterError):
    """Another process holds the store; `url` is where it serves, when it serves."""

    def __init__(self, root: Path, url: str | None) -> None:
        super().__init__(f"The store {root} is held by {url or 'another process'}.")
        self.url = url


def show(value: object) -> str:
    """`value` as short printable ASCII, fit for a message whatever an upload put into it."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class BaseText(Protocol):
    """The base's tokenizer and chat template."""

    @property
    def chat_template(self) -> str | None:
        """What renders chats, unless an adapter brings its own."""

    def prompt_ids(self, messages: list[dict[str, str]], template: str | None) -> list[int]:
        """Tokens of a chat request. Raises AdapterRefused where the template refuses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """The base that adapters must fit."""

    name: str  # what clients call it; no adapter may take it
    digest: str
    num_layers: int
    linears: Mapping[str, tuple[int, int]]  # "self_attn.q_proj" -> (out, in), in LINEARS' order
    aliases: frozenset[str] = frozenset()  # what adapter configs may call this base
    rope: Mapping[str, Any] = field(default_factory=dict)
    text: BaseText | None = None  # what adapters' prompts are compared with

    @classmethod
    def from_config(
        cls,
        path: Path,
        name: str,
        digest: str,
        *,
        aliases: frozenset[str] = frozenset(),
        text: BaseText | None = None,
    ) -> "BaseShape":
        """Read `config.json` of the Mistral or Llama checkpoint in folder `path`."""
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") not in ("mistral", "llama"):
            raise ValueError(f"{path}: model_type is {config.get('model_type')!r}, not mistral")
        known = {name, str(path), str(path.resolve()), path.resolve().name} | aliases
        if config.get("_name_or_path"):
            known.add(str(config["_name_or_path"]))
        return cls(
            name=name,
            digest=digest,
            num_layers=config["num_hidden_layers"],
            linears=_linear_shapes(config),
            aliases=frozenset(known),
            rope=_rope(config),
            text=text,
        )

    def is_called(self, declared: str) -> bool:
        """Whether an adapter config that says `declared` means this base (path, name or hub id)."""
        declared = declared.rstrip("/")
        owner, _, short = declared.partition("/")
        is_hub_id = bool(owner) and "/" not in short
        known = self.aliases | {self.name}
        return declared in known or (is_hub_id and short in known)

    @property
    def linear_names(self) -> Iterator[str]:
        """Full name of each linear that LoRA can change, as the checkpoint spells it."""
        for layer in range(self.num_layers):
            for linear in self.linears:
                yield f"model.layers.{layer}.{linear}"


def _linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear in a decoder layer."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    q_out = num_heads * head_dim
    kv_out = (config.get("num_key_value_heads") or num_heads) * head_dim
    shapes = (
        (q_out, hidden),
        (kv_out, hidden),
        (kv_out, hidden),
        (hidden, q_out),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    )
    return dict(zip(LINEARS, shapes, strict=True))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings as transformers 5 spells them, also from an older config."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an adapter may need at most."""

    max_rank: int = 256
    max_bank_rows: int = 512  # rank rows the bank holds
    page_rows: int = 8  # an adapter takes whole pages of this many rank rows
    max_bytes: int = 1 << 30  # of adapter_model.safetensors
    allow_other_base: bool = False  # accept an adapter whose config names another base

    def check_fit(self, num_rank_rows: int) -> None:
        """Refuse an adapter that the bank could never hold."""
        needed = math.ceil(num_rank_rows / self.page_rows) * self.page_rows
        if needed > self.max_bank_rows:
            raise AdapterRefused(
                "bank_rows",
                f"the adapter needs {num_rank_rows} bank rows, {needed} in pages of "
                f"{self.page_rows}; the bank holds {self.max_bank_rows}",
            )


class ModuleEntry(msgspec.Struct, frozen=True, kw_only=True):
    """LoRA on one linear of one layer."""

    layer: int
    linear: str  # one of LINEARS
    rank: int
    scaling: float  # alpha / rank, or alpha / sqrt(rank) with rsLoRA
    use_dora: bool = False

    @property
    def prefix(self) -> str:
        """How names of this module's tensors begin in a stored object."""
        return f"layers.{self.layer}.{self.linear}"


class AdapterManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about an adapter that changes its answers, tensors' bytes aside."""

    format: int = FORMAT
    modules: tuple[ModuleEntry, ...]  # by layer, then in LINEARS' order
    num_parameters: int
    num_bytes: int  # of the tensors
    rope: dict[str, Any] | None = None  # as trained: the base's, or linear or yarn scaling of it
    chat_template: str | None = None  # to use in place of the base's

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules)

    @property
    def use_dora(self) -> bool:
        """Whether any module is DoRA."""
        return any(module.use_dora for module in self.modules)

    @property
    def num_rank_rows(self) -> int:
        """Bank rows it takes: the largest rank, and one row of gains when a module uses DoRA."""
        return count_rank_rows(self.modules)

    def to_json(self) -> str:
        """Canonical JSON: equal manifests give equal text."""
        return msgspec.json.encode(self, order="sorted").decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "AdapterManifest":
        """Read `to_json`'s text. Raises msgspec.ValidationError for anything else."""
        return msgspec.json.decode(text, type=cls)


def count_rank_rows(modules: tuple[ModuleEntry, ...]) -> int:
    """Bank rows that these modules take."""
    return max(module.rank for module in modules) + any(module.use_dora for module in modules)
