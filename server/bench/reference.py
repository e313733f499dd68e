"""The reference for speed: random weights in the shape of Mistral-7B-v0.1, and adapters over it."""

import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from adapters.registry import Registry
from server.adapter_admin import base_shape
from server.base_digest import INDEX_FILE, SINGLE_FILE
from server.bench.workload import save_random_adapter
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig, PromotionConfig
from server.engine.request import AdapterRef
from server.engine.threads import use_one_thread
from server.model.loader import Checkpoint
from server.model.spec import FUSED, ModelSpec, read_spec

_LAYERS_PER_SHARD = 8
_GROUP = 128  # inputs that share a scale in GPTQ's layout
_ZEROS = -0x77777778  # 0x88888888: eight times the code 8, which stands for 0
_CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_reference_base(folder: Path, device: torch.device, **changes: object) -> ModelSpec:
    """Write a checkpoint, its weights made on `device`; `changes` replace fields of its config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG | changes))
    spec = read_spec(folder)
    _save_tokenizer(folder, spec.vocab_size)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return empty.normal_(std=0.02, generator=generator).cpu()

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:

        def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
            weight_map.update(dict.fromkeys(tensors, name))
            pool.submit(save_file, tensors, folder / name, {"format": "pt"})

        ends = {name: normal(spec.vocab_size, spec.hidden_size) for name in _ENDS}
        save("ends.safetensors", ends | {"model.norm.weight": _ones(spec)})
        for first in range(0, spec.num_layers, _LAYERS_PER_SHARD):
            tensors: dict[str, torch.Tensor] = {}
            for layer in range(first, min(first + _LAYERS_PER_SHARD, spec.num_layers)):
                prefix = f"model.layers.{layer}."
                for name in ("input_layernorm", "post_attention_layernorm"):
                    tensors[f"{prefix}{name}.weight"] = _ones(spec)
                for name in (name for names in FUSED.values() for name in names):
                    tensors[f"{prefix}{name}.weight"] = normal(*spec.linear_shape(name))
            save(f"layers-{first:02d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return spec


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word for each token id."""
    vocabulary = {f"\u2581w{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="\u2581w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\u2581w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def _ones(spec: ModelSpec) -> torch.Tensor:
    return torch.ones(spec.hidden_size, dtype=torch.bfloat16)


def save_reference_gptq(folder: Path, base: Path, device: torch.device) -> Path:
    """Write a GPTQ checkpoint of the base's shape: random codes, groups of 128, sym."""
    folder.mkdir(parents=True)
    spec = read_spec(base)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True}
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = settings | {"desc_act": False, "checkpoint_format": "gptq_v2"}
    (folder / "config.json").write_text(json.dumps(config))
    source = Checkpoint(base)
    ends = (*_ENDS, "model.norm.weight")
    tensors = {name: source.tensor(name) for name in ends if name in source}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = _ones(spec)
        for name in (name for names in FUSED.values() for name in names):
            out_features, in_features = spec.linear_shape(name)
            shapes = (in_features // 8, out_features), (in_features // _GROUP, out_features // 8)
            codes = torch.empty(shapes[0], dtype=torch.int32, device=device)
            codes.random_(-(1 << 31), 1 << 31)
            zeros = torch.full(shapes[1], _ZEROS, dtype=torch.int32)
            scales = torch.full((in_features // _GROUP, out_features), 0.005, dtype=torch.float16)
            order = torch.arange(in_features, dtype=torch.int32) // _GROUP
            parts = {
                "qweight": codes.cpu(),
                "qzeros": zeros,
                "scales": scales,
                "g_idx": order,
            }
            tensors |= {f"{prefix}{name}.{part}": value for part, value in parts.items()}
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def register_adapters(
    store: Path, base: Path, spec: ModelSpec, ranks: Iterable[int]
) -> list[AdapterRef]:
    """One random adapter of each rank, on every linear; as a0, a1, ... in the store."""
    with closing(Registry.open(store, base_shape(ModelConfig(path=base)))) as registry:

        def register(seed: int, rank: int) -> AdapterRef:
            with tempfile.TemporaryDirectory(dir=store) as scratch:
                folder = save_random_adapter(Path(scratch) / "adapter", spec, seed, rank)
                revision = registry.push(f"a{seed}", folder)
            return AdapterRef.of(revision)

        with ThreadPoolExecutor(8, initializer=use_one_thread) as pool:
            return list(pool.map(register, *zip(*enumerate(ranks), strict=True)))


def reference_config(
    base: Path,
    store: Path,
    cache: CacheConfig,
    bank_rows: int,
    *,
    host_bytes: int = 16 << 30,
    set_bytes: int = 0,
) -> Config:
    """The reference on a GPU."""
    return Config(
        model=ModelConfig(path=base, name="reference", device="cuda"),
        cache=cache,
        adapters=AdapterConfig(store=store, bank_rows=bank_rows, host_bytes=host_bytes),
        promotion=PromotionConfig(memory_bytes=set_bytes),
    )
