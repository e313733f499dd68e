"""Which modules a PEFT config reaches, by PEFT's own rules (0.21), with uploaded regexes leashed.

Patterns come from strangers, and Python's `re` can neither be interrupted nor leave the interpreter
lock while it backtracks. So a pattern that is more than a plain name is matched in a child process
with a CPU limit.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adapters.manifest import AdapterRefused, BaseShape, show

MAX_PATTERN_CHARS = 4096
MAX_PATTERNS = 4096
CPU_SECONDS = 1
WALL_SECONDS = 60.0  # a busy machine may be slow to start the child
ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's, for Mistral and for Llama

_PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\\.)*")  # no repeats, no alternatives: cannot backtrack

# Reads [[how, pattern], ...] and [key, ...]; writes, per pattern, {key: "idx" group or ""}.
_CHILD = f"""
import json, re, resource, sys, warnings
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
warnings.simplefilter("ignore")
jobs, keys = json.load(sys.stdin)
found = []
for how, pattern in jobs:
    try:
        match = getattr(re.compile(pattern), how)
        hits = {{key: m.groupdict().get("idx") or "" for key in keys if (m := match(key))}}
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        hits = str(error) or type(error).__name__
    found.append(hits)
json.dump(found, sys.stdout)
"""

How = Literal["match", "fullmatch"]
Hits = dict[str, str]  # key that matched -> its `idx` group, or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The fields of a PEFT config that choose modules."""

    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()


def select_modules(targets: Targets, base: BaseShape) -> list[str]:
    """Full names of the linears that LoRA is on, in the base's order. Refuses any other target."""
    keys = _module_names(base)
    reached = _reached(targets, keys, base)
    linears = set(base.linear_names)
    for key in reached:
        if key not in linears:
            raise AdapterRefused(
                "target_modules", f"reaches {key}; only the linears of decoder layers are served"
            )
    if not reached:
        raise AdapterRefused("target_modules", f"{show(targets.target_modules)} reaches no module")
    return [name for name in base.linear_names if name in reached]


def first_pattern(field: str, patterns: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """For each key, the first pattern that PEFT's `get_pattern_key` would pick; absent: none."""
    found = _search(
        field, "match", [rf"(.*\.)?({pattern})$" for pattern in patterns], keys, patterns
    )
    chosen: dict[str, str] = {}
    for pattern, hits in zip(patterns, found, strict=True):
        for key in hits:
            chosen.setdefault(key, pattern)
    return chosen


def _reached(targets: Targets, keys: list[str], base: BaseShape) -> set[str]:
    """`check_target_module_exists` of PEFT, for every module at once."""
    wanted, excluded = targets.target_modules, targets.exclude_modules
    by_layer = set(keys)
    if wanted is None:
        wanted = DEFAULT_TARGETS
    if isinstance(wanted, str):
        if wanted.lower() == ALL_LINEAR:
            found = set(base.linear_names)
        else:
            found = set(_search("target_modules", "fullmatch", [wanted], keys)[0])
    else:
        if targets.layers_to_transform:
            layers = _layer_indexes(targets, keys)
            by_layer = {key for key in keys if layers.get(key) in targets.layers_to_transform}
        # PEFT asks for the layer only when the entry is a suffix, not when it is the full name
        found = {key for key in keys if _ends_with(key, wanted) and key in by_layer}
        found |= set(wanted) & set(keys)
    if not excluded:
        return found
    if isinstance(excluded, str):
        return found - set(_search("exclude_modules", "fullmatch", [excluded], keys)[0])
    return {key for key in found if key not in excluded and not _ends_with(key, excluded)}


def _ends_with(key: str, suffixes: Sequence[str]) -> bool:
    return key.endswith(tuple(f".{suffix}" for suffix in suffixes))


def _layer_indexes(targets: Targets, keys: list[str]) -> dict[str, int]:
    """The layer each key lies in, by PEFT's reading of `layers_pattern`."""
    patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in targets.layers_pattern]
    shown: Sequence[str] = targets.layers_pattern
    if not patterns:
        patterns, shown = [r".*?\.[^.]*\.(?P<idx>\d+)\."], ("layers",)
    indexes: dict[str, int] = {}
    for hits in _search("layers_pattern", "match", patterns, keys, shown):
        for key, index in hits.items():
            indexes.setdefault(key, int(index))
    return indexes


def _module_names(base: BaseShape) -> list[str]:
    """Every module of a Mistral checkpoint, the ones LoRA cannot be on included."""
    names = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"]
    parts = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm")
    for layer in range(base.num_layers):
        prefix = f"model.layers.{layer}"
        names += [prefix, *(f"{prefix}.{part}" for part in (*parts, *base.linears))]
    return [*names, "lm_head"]


def _search(
    field: str,
    how: How,
    patterns: Sequence[str],
    keys: Sequence[str],
    uploaded: Sequence[str] | None = None,
) -> list[Hits]:
    """Match every pattern with every key. `uploaded`: the part of each pattern a stranger wrote."""
    uploaded = patterns if uploaded is None else uploaded
    if len(patterns) > MAX_PATTERNS or any(len(text) > MAX_PATTERN_CHARS for text in uploaded):
        raise AdapterRefused(
            field, f"has over {MAX_PATTERNS} patterns, or one over {MAX_PATTERN_CHARS} characters"
        )
    if not patterns:
        return []
    if all(_PLAIN.fullmatch(text) for text in uploaded):
        return [_hits(re.compile(pattern), how, keys) for pattern in patterns]
    return _search_in_child(field, how, patterns, keys)


def _hits(pattern: re.Pattern[str], how: How, keys: Sequence[str]) -> Hits:
    match = pattern.fullmatch if how == "fullmatch" else pattern.match
    return {key: m.groupdict().get("idx") or "" for key in keys if (m := match(key))}


def _search_in_child(
    field: str, how: How, patterns: Sequence[str], keys: Sequence[str]
) -> list[Hits]:
    """`_search`, where a pattern may be anything at all."""
    jobs = json.dumps([[(how, pattern) for pattern in patterns], list(keys)])
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=jobs.encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise AdapterRefused(
            field, f"takes over {CPU_SECONDS} s to match ({show(patterns[0])})"
        ) from error
    found: list[Hits | str] = json.loads(child.stdout)
    hits: list[Hits] = []
    for pattern, result in zip(patterns, found, strict=True):
        if isinstance(result, str):
            raise AdapterRefused(field, f"is not a regular expression ({result}): {show(pattern)}")
        hits.append(result)
    return hits
