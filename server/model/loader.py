"""A checkpoint folder to a resident base: host memory holds one unquantized layer at a time.

`load_weight_set` loads a second set of weights beside a base, for the same engine.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from server.base_digest import SINGLE_FILE, read_index
from server.kernels.dense_linear import DenseWeight, pack
from server.model.decoder import Decoder, Layer
from server.model.linear import Matrix, activation_dtype, make_linear
from server.model.rotary import RotaryTables
from server.model.spec import FUSED, ModelSpec
from server.quant import int4

OnProgress = Callable[[str, float], None]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of a weight that is not quantized
# What a weight set may have of its own: it runs on the base's KV cache and rotary tables.
_OWN_FIELDS = ("max_positions", "tie_word_embeddings", "eos_token_ids")


class Checkpoint:
    """Tensors of a safetensors checkpoint, by name, wherever its shards hold them.

    ValueError says which of its files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gptq = int4.read_format(folder)  # None: not quantized
        self._shard_of = read_index(folder) or dict.fromkeys(
            _opened(folder / SINGLE_FILE).keys(), SINGLE_FILE
        )
        self._open = {name: _opened(folder / name) for name in set(self._shard_of.values())}

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale of GPTQ's; None: not quantized."""
        return None if self.gptq is None else self.gptq.group_size

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, maybe the file's own pages; ValueError if there is none of this name."""
        if name not in self._shard_of:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        shard = self._shard_of[name]
        with _naming(self.folder / shard):
            found: torch.Tensor = self._open[shard].get_tensor(name)
        return found

    def matrix(self, linear: str, device: torch.device) -> Matrix:
        """The weight of a linear, named without `.weight`; GPTQ's codes are unpacked on the device.

        ValueError says what is wrong with it.
        """
        if self.gptq is None:
            return self.tensor(f"{linear}.weight")

        def read(name: str) -> torch.Tensor | None:
            return self.tensor(name) if name in self else None

        try:
            return int4.read_linear(linear, self.gptq, read, device)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    def has_tied_head(self, spec: ModelSpec) -> bool:
        """Whether the head is the embedding's matrix: GPTQ's tools may leave it out unsaid."""
        is_left_out = self.gptq is not None and "lm_head.weight" not in self
        return spec.tie_word_embeddings or is_left_out


def _opened(path: Path) -> safe_open:
    with _naming(path):
        return safe_open(path, framework="pt")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what safetensors finds wrong with a file into a ValueError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or was not copied in full: {error}") from error


def weight(
    checkpoint: Checkpoint, spec: ModelSpec, name: str, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A norm, the embedding or the head, named without `.weight`, in memory of its own.

    So whoever writes to the file later changes no running model. ValueError for another shape.
    """
    rows = () if name.endswith("norm") else (spec.vocab_size,)
    found = checkpoint.tensor(f"{name}.weight")
    _check(checkpoint, name, found, (*rows, spec.hidden_size))
    return found.to(device, dtype, copy=True)


def stacked(
    checkpoint: Checkpoint, spec: ModelSpec, index: int, group: str, device: torch.device
) -> list[Matrix]:
    """The linears of a layer that are one matrix at run time. ValueError for another shape."""
    matrices = []
    for name in FUSED[group]:
        linear = f"model.layers.{index}.{name}"
        matrices.append(checkpoint.matrix(linear, device))
        _check(checkpoint, linear, matrices[-1], spec.linear_shape(name))
    return matrices


def _check(checkpoint: Checkpoint, name: str, found: Matrix, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != shape:
        raise ValueError(
            f"{checkpoint.folder}: {name} is {list(found.shape)}; its config.json makes it "
            f"{list(shape)}"
        )
    if isinstance(found, torch.Tensor) and found.dtype not in _DTYPES:
        raise ValueError(f"{checkpoint.folder}: {name} is {found.dtype}; 16 or 32 bits are read")


def check_quantization(folder: Path, quantization: str) -> int4.GPTQFormat | None:
    """How a folder's weights are stored; None: in 16 bits or more.

    ValueError where they cannot be served in this quantization.
    """
    found = int4.read_format(folder)
    if found and quantization != "gptq":
        raise ValueError(
            f"{folder} holds a GPTQ checkpoint, 4 bits already: it is served with quantization "
            f"gptq, not {quantization}"
        )
    if quantization == "nf4" and _is_merged(folder):
        raise ValueError(
            f"{folder} holds a base with an adapter merged into it, most of which NF4's rounding "
            "would erase: serve it with quantization none, or `turnout quantize` it first"
        )
    if quantization == "gptq" and not found:
        raise ValueError(
            f"{folder} holds no GPTQ checkpoint, as quantization gptq wants it, but an unquantized "
            "one; nf4 and none serve those"
        )
    return found


def _is_merged(folder: Path) -> bool:
    """Whether `turnout merge` made the folder."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads((folder / "turnout.json").read_bytes())["kind"] == "merged")
    return False


def check_weight_set(checkpoint: Checkpoint, spec: ModelSpec, base: ModelSpec) -> None:
    """ValueError where a checkpoint cannot be a weight set beside this base."""
    if checkpoint.gptq is None:
        raise ValueError(f"{checkpoint.folder}: a weight set is a GPTQ checkpoint; this is none")
    for field in fields(ModelSpec):
        own, wanted = getattr(spec, field.name), getattr(base, field.name)
        if own != wanted and field.name not in _OWN_FIELDS:
            raise ValueError(
                f"{checkpoint.folder}: {field.name} is {own}, the base's is {wanted}; a weight set "
                "has the base's shape"
            )


def shared(tensor: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """`known` itself where the two are equal, so that they are held once."""
    return known if torch.equal(tensor, known) else tensor


def load_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    rotary: RotaryTables,
    on_progress: OnProgress,
) -> Decoder:
    """Load, quantize and pack the base. ValueError says what is wrong with the checkpoint."""
    check_quantization(checkpoint.folder, quantization)
    layers = []
    for index in range(spec.num_layers):
        layers.append(_load_layer(checkpoint, spec, index, quantization, dtype, device))
        on_progress("loading the base", (index + 1) / spec.num_layers)
    embedding = weight(checkpoint, spec, "model.embed_tokens", device, dtype)
    is_tied = checkpoint.has_tied_head(spec)
    head = embedding if is_tied else weight(checkpoint, spec, "lm_head", device, dtype)
    activations = activation_dtype(dtype, device)
    final_norm = weight(checkpoint, spec, "model.norm", device, activations)
    return Decoder(spec, embedding, layers, final_norm, pack(head), rotary)


def load_weight_set(checkpoint: Checkpoint, spec: ModelSpec, base: Decoder) -> Decoder:
    """A GPTQ checkpoint as a decoder beside a running one; what equals the base's is the base's.

    Runs in any thread. ValueError says what is wrong with the checkpoint.
    """
    check_weight_set(checkpoint, spec, base.spec)
    device, dtype = base.device, base.dtype
    layers = []
    for index, known in enumerate(base.layers):
        layer = _load_layer(checkpoint, spec, index, "gptq", dtype, device)
        norms = (
            shared(layer.input_norm, known.input_norm),
            shared(layer.post_attention_norm, known.post_attention_norm),
        )
        layers.append(Layer(*norms, layer.linears))
    embedding = weight(checkpoint, spec, "model.embed_tokens", device, dtype)
    is_tied = checkpoint.has_tied_head(spec)
    head = embedding if is_tied else weight(checkpoint, spec, "lm_head", device, dtype)
    final_norm = weight(checkpoint, spec, "model.norm", device, base.final_norm.dtype)
    return Decoder(
        spec,
        shared(embedding, base.embedding),
        layers,
        shared(final_norm, base.final_norm),
        _shared_head(head, base.lm_head),
        base.rotary,
    )


def _shared_head(head: torch.Tensor, known: DenseWeight) -> DenseWeight:
    plain = known.weight.to_dense() if known.is_packed else known.weight
    return known if torch.equal(head, plain) else pack(head)


def _load_layer(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    index: int,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Layer:
    def norm(name: str) -> torch.Tensor:
        full_name = f"model.layers.{index}.{name}"
        return weight(checkpoint, spec, full_name, device, activation_dtype(dtype, device))

    linears = {}
    for group in FUSED:
        matrices = stacked(checkpoint, spec, index, group, device)
        linears[group] = make_linear(matrices, quantization, dtype, device)
    return Layer(norm("input_layernorm"), norm("post_attention_layernorm"), linears)
