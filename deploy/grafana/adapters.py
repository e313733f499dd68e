"""The dashboard *Adapters*: who is asked for, who waits, who is loaded, whom to merge."""

from deploy.grafana.panels import Dashboard, Panel, Query, Row, variable
from deploy.grafana.queries import (
    OF_ADAPTER,
    busiest,
    mean,
    quantile,
    rate,
    ratio,
    select,
    total,
)

_SHOWN = 12  # adapters in a picture
_NAME = "{{adapter}}"
_SHARE = f"max by (adapter) (adapter:turnout_token_share:ratio_rate1h{{{OF_ADAPTER}}})"


def adapters() -> Dashboard:
    """Each adapter's traffic, latency, loads and evictions, and the bank they share."""
    return Dashboard(
        uid="turnout-adapters",
        title="Turnout: Adapters",
        says="What each adapter is asked for, how fast it answers, and where it is.",
        rows=(_each(), _traffic(), _latency(), _bank(), _loads()),
        variables=(variable("adapter", "Adapter", "turnout_adapter_requests_total"),),
    )


def _of(metric: str, by: str = "adapter") -> str:
    return rate(metric, OF_ADAPTER, by=by)


def _mean(metric: str) -> str:
    return f"({mean(metric, OF_ADAPTER, by='adapter')})"


def _top(expr: str, legend: str = _NAME) -> tuple[Query, ...]:
    return (Query(busiest(_SHOWN, expr), legend),)


def _each() -> Row:
    loads = rate(
        "turnout_adapter_loads_total", OF_ADAPTER, 'result="ok"', by="adapter", window="1h"
    )
    evicted = rate("turnout_adapter_evictions_total", OF_ADAPTER, by="adapter", window="1h")
    columns = (
        ("Requests / s", _of("turnout_adapter_requests_total")),
        ("Tokens / s", _of("turnout_adapter_generation_tokens_total")),
        ("Share of tokens, 1 h", _SHARE),
        (
            "First token, s",
            _mean("turnout_adapter_time_to_first_token_seconds"),
        ),
        ("Loads / h", f"{loads} * 3600"),
        ("Evictions / h", f"{evicted} * 3600"),
        ("Bytes in the bank", total("turnout_adapter_resident_bytes", OF_ADAPTER, by="adapter")),
    )
    return Row(
        "Each adapter",
        (
            Panel(
                title="Adapters",
                says="With bytes in the bank it is resident: its next request loads nothing.",
                queries=tuple(Query(expr) for _, expr in columns),
                columns=tuple(name for name, _ in columns),
                kind="table",
                width=16,
                height=12,
            ),
            Panel(
                title="Candidates for merging",
                says="Share of all tokens in the last hour, by the adapter path. Merging pays "
                "above the break-even share that `turnout loadtest compare` reports.",
                queries=_top(_SHARE),
                kind="bargauge",
                unit="percentunit",
                width=8,
                height=12,
                limits=(0.2, 0.5),
            ),
        ),
    )


def _traffic() -> Row:
    shown = {
        "Requests": ("turnout_adapter_requests_total", "Requests a second that ended.", "reqps"),
        "Generated tokens": ("turnout_adapter_generation_tokens_total", "A second.", "short"),
        "Prompt tokens": ("turnout_adapter_prompt_tokens_total", "A second.", "short"),
    }
    failed = _of("turnout_adapter_errors_total", by="adapter, code")
    return Row(
        f"Traffic (the {_SHOWN} busiest)",
        (
            *(
                Panel(title=title, says=says, queries=_top(_of(metric)), unit=unit, stacked=True)
                for title, (metric, says, unit) in shown.items()
            ),
            Panel(
                title="Failed requests",
                says="adapter_load_failed: its object is gone or damaged; push it again.",
                queries=_top(failed, f"{_NAME} {{{{code}}}}"),
                unit="reqps",
                width=24,
                height=6,
            ),
        ),
    )


def _latency() -> Row:
    def p90(title: str, name: str) -> Panel:
        expr = quantile(0.9, f"turnout_top_adapter_{name}", OF_ADAPTER, by="adapter")
        says = "Of the 16 busiest adapters; `other` is all the rest together."
        return Panel(title=f"{title}, p90", says=says, queries=(Query(expr, _NAME),), unit="s")

    def means(title: str, metric: str, says: str) -> Panel:
        return Panel(title=title, says=says, queries=_top(_mean(metric)), unit="s", width=12)

    return Row(
        "Latency (0 where nothing was served)",
        (
            p90("Time to first token", "time_to_first_token_seconds"),
            p90("Between tokens", "inter_token_latency_seconds"),
            p90("End to end", "e2e_request_latency_seconds"),
            means(
                "Slowest first tokens, mean",
                "turnout_adapter_time_to_first_token_seconds",
                "Of every adapter, the slowest.",
            ),
            means(
                "Longest in the queue, mean",
                "turnout_adapter_queue_time_seconds",
                "Waiting for a place in the bank, for the load, or for its turn.",
            ),
        ),
    )


def _bank() -> Row:
    held = total("turnout_bank_rows_used", by="instance")
    used = ratio(held, total("turnout_bank_rows", by="instance"))
    lists = "max_lora, running_lora_adapters, waiting_lora_adapters"
    age = f"time() - max by (instance, {lists}) ({select('vllm:lora_requests_info')})"
    return Row(
        "The bank",
        (
            Panel(
                title="Bank rows in use",
                says="Full is normal: what is idle leaves for others. See loads per request.",
                queries=(Query(used, "{{instance}}"),),
                unit="percentunit",
            ),
            Panel(
                title="Host memory of adapters",
                says="What left the bank and comes back without reading the disk.",
                queries=(
                    Query(total("turnout_host_adapter_bytes", by="instance"), "{{instance}}"),
                ),
                unit="bytes",
            ),
            Panel(
                title="Bytes in the bank",
                says="By adapter.",
                queries=_top(total("turnout_adapter_resident_bytes", OF_ADAPTER, by="adapter")),
                unit="bytes",
                stacked=True,
            ),
            Panel(
                title="Resident and waited for",
                says="running: in the bank. waiting: wanted and not there.",
                queries=(Query(age),),
                columns=("Age of the lists, s",),
                kind="table",
                width=24,
                height=5,
            ),
        ),
    )


def _loads() -> Row:
    loads = _of("turnout_adapter_loads_total", by="adapter, tier, result")
    evictions = _of("turnout_adapter_evictions_total", by="adapter, tier")
    return Row(
        "Loads and evictions",
        (
            Panel(
                title="Loads per request",
                says="0: every adapter was there when its request came. Near 1, with "
                "evictions: TurnoutAdaptersThrash.",
                queries=(
                    Query("instance:turnout_loads_per_request:ratio_rate10m", "{{instance}}"),
                ),
                unit="percentunit",
                limits=(0.25, 0.5),
            ),
            Panel(
                title="Loads into the bank",
                says="From which tier, a second. Failed ones: TurnoutAdapterLoadsFail.",
                queries=(
                    Query(
                        rate("turnout_bank_loads_total", by="tier, result"), "{{tier}} {{result}}"
                    ),
                ),
                stacked=True,
            ),
            Panel(
                title="Evictions",
                says="gpu: from the bank. host: from host memory, so the next load reads the disk.",
                queries=(Query(rate("turnout_evictions_total", by="tier"), "{{tier}}"),),
                stacked=True,
            ),
            Panel(
                title="Loads by adapter",
                says="The most loaded. One that is loaded all the time is a candidate for a pin.",
                queries=_top(loads, f"{_NAME} {{{{tier}}}} {{{{result}}}}"),
            ),
            Panel(
                title="Mean time of a load",
                says="The slowest adapters. What a first request waits.",
                queries=_top(_mean("turnout_adapter_load_seconds")),
                unit="s",
            ),
            Panel(
                title="Evictions by adapter",
                says="The most evicted.",
                queries=_top(evictions, f"{_NAME} {{{{tier}}}}"),
            ),
        ),
    )
