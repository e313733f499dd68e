"""What an operator chooses is checked when it is built, and an error names it."""

import math
from pathlib import Path
from typing import Any

import pytest

from server.config import (
    AdapterConfig,
    CacheConfig,
    ModelConfig,
    PromotionConfig,
    SchedulerConfig,
    ServerConfig,
)

SECTIONS: dict[str, Any] = {
    "model": lambda **fields: ModelConfig(**({"path": Path("base")} | fields)),
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "adapters": AdapterConfig,
    "promotion": PromotionConfig,
    "server": ServerConfig,
}


def test_the_defaults_stand() -> None:
    for section in SECTIONS.values():
        section()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("model.name", "", "a non-empty name"),
        ("model.quantization", "int3", "nf4, gptq or none"),
        ("model.max_model_len", -1, "at least 0"),
        ("cache.block_size", 12, "a positive multiple of 8"),
        ("cache.num_blocks", -1, "at least 0"),
        ("cache.cpu_bytes", -1, "at least 0"),
        ("cache.memory_fraction", 0, r"in (0, 1]"),
        ("scheduler.max_running", 0, "at least 1"),
        ("scheduler.max_wait_s", -0.5, "at least 0"),
        ("scheduler.max_step_tokens", 63, "at least scheduler.max_running (64), or 0"),
        ("scheduler.max_prefill_tokens", 63, "at least scheduler.max_running (64), or 0"),
        ("adapters.bank_rows", 12, "a multiple of page_rows (8)"),
        ("adapters.rotary_tables", 0, "at least 1"),
        ("adapters.host_bytes", -1, "at least 0"),
        ("adapters.max_upload_bytes", 0, "at least 1"),
        ("adapters.max_rank", 1025, "in 1..1024"),
        ("promotion.policy", "always", "off or auto"),
        ("promotion.min_tokens", 0, "at least 1"),
        ("promotion.memory_bytes", -1, "at least 0"),
        ("promotion.max_sets", -1, "at least 0"),
        ("promotion.cool_down_s", math.nan, "at least 0"),
        ("promotion.device", "tpu", "cpu or cuda"),
        ("promotion.rows", "nowhere", "there"),
        ("server.port", 1 << 16, "in 0..65535"),
        ("server.max_waiting", 0, "at least 1"),
        ("server.max_waiting_per_tenant", 0, "at least 1"),
        ("server.max_body_bytes", 0, "at least 1"),
        ("server.drain_s", math.inf, "finite"),
        ("server.stall_s", -1.0, "at least 0"),
        ("server.engine_silence_s", 1.5, "at least 2, or 0 for no limit"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any, wanted: str) -> None:
    section, field = name.split(".")
    if field == "rows":
        value = Path(value)
    with pytest.raises(ValueError, match=rf"^{name} is .*must be") as refusal:
        SECTIONS[section](**{field: value})
    assert str(refusal.value).endswith(f"it must be {wanted}")
