"""Everything an operator can choose, checked when it is built and never changed after."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Quantization = Literal["nf4", "gptq", "none"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Policy = Literal["off", "auto"]
PromotionDevice = Literal["cpu", "cuda"]


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def _check_at_least(least: int, section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value >= least, f"{section}.{name}", value, f"at least {least}")
        _check(value < math.inf, f"{section}.{name}", value, "finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The resident base."""

    path: Path  # a checkpoint folder: config.json, tokenizer, safetensors
    name: str = "base"  # what clients call it
    quantization: Quantization = "nf4"  # gptq: the checkpoint's own 4 bits
    dtype: Dtype = "auto"  # of activations and KV; auto is bfloat16
    device: str = "auto"  # auto is cuda where there is one, else cpu
    max_model_len: int = 0  # tokens of prompt and completion; 0 is the checkpoint's own limit,
    # and past that limit only adapters trained with RoPE scaling go

    def __post_init__(self) -> None:
        _check(bool(self.name), "model.name", self.name, "a non-empty name")
        _check_at_least(0, "model", self, "max_model_len")
        _check(
            self.quantization in ("nf4", "gptq", "none"),
            "model.quantization",
            self.quantization,
            "nf4, gptq or none",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The KV cache."""

    block_size: int = 16  # tokens per KV block
    num_blocks: int = 0  # 0: as many as memory_fraction (GPU) or cpu_bytes (CPU) holds
    memory_fraction: float = 0.9  # of the GPU memory left after weights and adapter bank
    cpu_bytes: int = 1 << 30  # KV cache size on a machine without a GPU
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        _check(
            self.block_size > 0 and self.block_size % 8 == 0,
            "cache.block_size",
            self.block_size,
            "a positive multiple of 8",
        )
        _check_at_least(0, "cache", self, "num_blocks", "cpu_bytes")
        _check(
            0 < self.memory_fraction <= 1,
            "cache.memory_fraction",
            self.memory_fraction,
            "in (0, 1]",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How a step is filled."""

    max_step_tokens: int = 0  # prompt and decode tokens in one step; 0: what suits the device
    max_prefill_tokens: int = 0  # the same where nobody decodes, and so nobody waits; 0: likewise
    max_running: int = 64  # requests in one step
    token_fair: bool = True  # between adapters; False is first come, first served
    max_wait_s: float = 10.0  # an adapter whose requests wait longer goes first, and takes a place
    overlap: bool | None = None  # plan a step while the last one runs; None: on a GPU only

    def __post_init__(self) -> None:
        _check_at_least(1, "scheduler", self, "max_running")
        _check_at_least(0, "scheduler", self, "max_wait_s")
        for name in ("max_step_tokens", "max_prefill_tokens"):
            num_tokens = getattr(self, name)
            _check(
                num_tokens == 0 or num_tokens >= self.max_running,
                f"scheduler.{name}",
                num_tokens,
                f"at least scheduler.max_running ({self.max_running}), or 0",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Where adapters live and how many fit."""

    store: Path = Path(".turnout/store")
    bank_rows: int = 512  # rank rows in the bank: 32 adapters of rank 16
    page_rows: int = 8  # an adapter takes whole pages of this many rank rows
    rotary_tables: int = 4  # RoPE scalings that adapters in the bank may have between them
    host_bytes: int = 1 << 30  # host memory for adapters that left the bank
    max_rank: int = 256
    max_upload_bytes: int = 1 << 30
    allowed_roots: tuple[Path, ...] = ()  # folders that lora_path may name
    allow_other_base: bool = False  # accept an adapter whose config names another base

    def __post_init__(self) -> None:
        _check(
            self.bank_rows >= self.page_rows > 0 and self.bank_rows % self.page_rows == 0,
            "adapters.bank_rows",
            self.bank_rows,
            f"a multiple of page_rows ({self.page_rows})",
        )
        _check_at_least(1, "adapters", self, "rotary_tables", "max_upload_bytes")
        _check_at_least(0, "adapters", self, "host_bytes")
        _check(1 <= self.max_rank <= 1024, "adapters.max_rank", self.max_rank, "in 1..1024")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionConfig:
    """When adapters get models of their own without being asked to, and from what."""

    policy: Policy = "off"  # auto: by popularity
    min_tokens: int = 200_000  # recent ones (half-life 6 h) that make a revision a candidate
    memory_bytes: int = 0  # set aside for merged models; 0: none on a GPU, no limit on a CPU
    max_sets: int = 1  # promoted by the policy or not: past it the policy promotes no more
    cool_down_s: float = 3600.0  # between two things that the policy does about one revision
    rows: Path | None = None  # folder of <adapter name>.jsonl: what the policy calibrates on
    text: Path | None = None  # general text that the policy calibrates on, beside the rows
    device: PromotionDevice = "cpu"  # where the policy's promotions compute
    step_times: Path | None = None  # measured steps for the estimates; None: one H100's

    def __post_init__(self) -> None:
        _check(self.policy in ("off", "auto"), "promotion.policy", self.policy, "off or auto")
        _check_at_least(1, "promotion", self, "min_tokens")
        _check_at_least(0, "promotion", self, "memory_bytes", "max_sets", "cool_down_s")
        _check(self.device in ("cpu", "cuda"), "promotion.device", self.device, "cpu or cuda")
        _check(
            self.policy == "off" or self.rows is not None,
            "promotion.rows",
            self.rows,
            "a folder of <adapter name>.jsonl where promotion.policy is auto",
        )
        for name, path in (("rows", self.rows), ("text", self.text)):
            _check(path is None or path.exists(), f"promotion.{name}", str(path), "there")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """HTTP: where to listen, whom to let in, how much to take on."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None  # file of hashed keys; required when host is not loopback
    max_waiting: int = 256  # admitted requests, running ones included; past it: 503
    max_waiting_per_tenant: int = 128  # past it: 429
    max_body_bytes: int = 4 << 20  # of a request that is not an adapter upload
    drain_s: float = 30.0  # grace period for running streams at SIGTERM
    stall_s: float = 10.0  # a client that takes or sends nothing for this long is dropped
    engine_silence_s: float = 300.0  # an engine that says nothing for this long is started afresh

    def __post_init__(self) -> None:
        _check(0 <= self.port < 1 << 16, "server.port", self.port, "in 0..65535")
        _check_at_least(
            1, "server", self, "max_waiting", "max_waiting_per_tenant", "max_body_bytes"
        )
        _check_at_least(0, "server", self, "drain_s", "stall_s")
        _check(
            self.engine_silence_s == 0 or 2 <= self.engine_silence_s < math.inf,
            "server.engine_silence_s",  # it speaks twice a second
            self.engine_silence_s,
            "at least 2, or 0 for no limit",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole of it."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    promotion: PromotionConfig = field(default_factory=PromotionConfig)


def state_folder() -> Path:
    """Where Turnout keeps what it makes: `$TURNOUT_HOME`, or `.turnout` in the current folder."""
    return Path(os.environ.get("TURNOUT_HOME", ".turnout"))
