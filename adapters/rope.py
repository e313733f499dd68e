"""Rotary embedding stretched beyond the length that the base was trained on: linear and yarn."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from adapters.manifest import AdapterRefused, show

MAX_POSITIONS = 1 << 24
_KINDS = ("linear", "yarn")
_YARN_FIELDS = (
    "original_max_position_embeddings",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "truncate",
)


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an adapter's rotary embedding differs from the base's. Equal ones are equal tables.

    linear (arXiv:2306.15595) divides every frequency by `factor`; the other fields are yarn's
    (arXiv:2309.00071), by transformers' names and with its defaults.
    """

    rope_type: Literal["linear", "yarn"]
    factor: float  # 1 or more
    original_max_position_embeddings: int = 0  # 0 for linear, which does not depend on it
    attention_factor: float = 1.0  # cosines and sines are multiplied by it
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def read(
        cls,
        fields: Mapping[str, Any],
        *,
        theta: float,
        max_positions: int | None = None,
        where: str = "rope",
    ) -> "RopeScaling":
        """Check settings as transformers spells them, `type` for `rope_type` included.

        `theta` and `max_positions` are the base's; without the latter yarn must name the length it
        stretches. Raises AdapterRefused, which names `where` and the field.
        """
        settings = {name: value for name, value in fields.items() if value is not None}
        kind = settings.pop("rope_type", settings.pop("type", None))
        if kind not in _KINDS:
            raise AdapterRefused(
                f"{where}.rope_type", f"{show(kind)} is not served; linear and yarn are"
            )
        settings.pop("type", None)
        found_theta = settings.pop("rope_theta", theta)
        if found_theta != theta:
            raise AdapterRefused(
                f"{where}.rope_theta", f"{show(found_theta)} is not the base's ({theta:g})"
            )
        for name in settings:
            if name != "factor" and not (kind == "yarn" and name in _YARN_FIELDS):
                raise AdapterRefused(f"{where}.{show(name)[1:-1]}", f"is no setting of {kind} RoPE")
        factor = _number(settings, "factor", where, least=1.0)
        if kind == "linear":
            return cls(rope_type="linear", factor=factor)
        settings.setdefault("original_max_position_embeddings", max_positions)
        length = settings["original_max_position_embeddings"]
        if (
            not isinstance(length, int)
            or isinstance(length, bool)
            or not 1 <= length <= MAX_POSITIONS
        ):
            raise AdapterRefused(
                f"{where}.original_max_position_embeddings",
                f"{show(length)} is not a number of positions, 1 to {MAX_POSITIONS}",
            )
        truncate = settings.get("truncate", True)
        if not isinstance(truncate, bool):
            raise AdapterRefused(f"{where}.truncate", f"{show(truncate)} is neither true nor false")
        beta_fast = _number(settings, "beta_fast", where, 32.0)
        beta_slow = _number(settings, "beta_slow", where, 1.0)
        if beta_fast < beta_slow:
            raise AdapterRefused(
                f"{where}.beta_fast", f"{beta_fast:g} is below beta_slow ({beta_slow:g})"
            )
        return cls(
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=length,
            attention_factor=_attention_factor(settings, factor, where),
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            truncate=truncate,
        )

    def as_parameters(self, theta: float) -> dict[str, Any]:
        """What transformers 5 calls `rope_parameters`; `read` gives this scaling again."""
        found: dict[str, Any] = {
            "rope_type": self.rope_type,
            "rope_theta": theta,
            "factor": self.factor,
        }
        if self.rope_type == "yarn":
            found |= {
                "original_max_position_embeddings": self.original_max_position_embeddings,
                "attention_factor": self.attention_factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "truncate": self.truncate,
            }
        return found

    def max_length(self, base_length: int) -> int:
        """Positions it is meant for, over a base that was trained on `base_length`."""
        length = self.original_max_position_embeddings or base_length
        return max(base_length, int(length * self.factor))

    def __str__(self) -> str:
        if self.rope_type == "linear":
            return f"linear, factor {self.factor:g}"
        return (
            f"yarn, factor {self.factor:g} over {self.original_max_position_embeddings:,} positions"
        )


def scaling_of(rope: Mapping[str, Any] | None) -> RopeScaling | None:
    """The scaling of RoPE settings that were checked before; None for the base's own."""
    if rope is None or rope.get("rope_type", "default") == "default":
        return None
    return RopeScaling.read(rope, theta=rope["rope_theta"])


def _attention_factor(settings: Mapping[str, Any], factor: float, where: str) -> float:
    """yarn's factor on cosines and sines, given or worked out as transformers does."""
    has_mscale = [name in settings for name in ("mscale", "mscale_all_dim")]
    if "attention_factor" in settings:
        if any(has_mscale):
            raise AdapterRefused(f"{where}.mscale", "means nothing beside attention_factor")
        return _number(settings, "attention_factor", where)
    if not any(has_mscale):
        return _temperature(factor, 1.0)
    if not all(has_mscale):
        raise AdapterRefused(
            f"{where}.mscale", "means nothing without mscale_all_dim, nor it alone"
        )
    over = _temperature(factor, _number(settings, "mscale", where))
    return over / _temperature(factor, _number(settings, "mscale_all_dim", where))


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(
    settings: Mapping[str, Any],
    name: str,
    where: str,
    default: float | None = None,
    *,
    least: float = 0.0,
) -> float:
    """A finite number above 0 and not below `least`."""
    value = settings.get(name, default)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not least <= value < 1e9
        or value <= 0
    ):
        wanted = f"a number of {least:g} or more" if least else "a number above 0"
        raise AdapterRefused(f"{where}.{name}", f"{show(value)} is not {wanted}")
    return float(value)
