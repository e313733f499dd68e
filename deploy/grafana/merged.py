"""The dashboard *Merged against adapter*: what the merged path gives, and who takes it."""

from deploy.grafana.panels import Dashboard, Panel, Query, Row, variable
from deploy.grafana.queries import (
    E2E,
    ITL,
    OF_ADAPTER,
    TTFT,
    busiest,
    or_zero,
    quantile,
    rate,
    select,
    total,
)

_PATHS = ("adapter", "merged")


def merged() -> Dashboard:
    """The two ways of serving an adapter, beside each other; 0 where one was not taken."""
    return Dashboard(
        uid="turnout-merged",
        title="Turnout: Merged against adapter",
        says="The two ways of serving an adapter beside each other. 0 where one was not taken.",
        rows=(_gain(), _latency(), _traffic(), _promotions()),
        variables=(variable("adapter", "Adapter", "turnout_adapter_requests_total"),),
    )


def _is(path: str) -> str:
    return f'path="{path}"'


def _quantiles(q: float, histogram: str) -> tuple[Query, ...]:
    return tuple(
        Query(or_zero(quantile(q, histogram, _is(path))), f"{path} p{round(q * 100)}")
        for path in _PATHS
    )


def _mean_gap(path: str) -> str:
    """The mean time between tokens; nothing at all where the path generated none."""
    count = rate(f"{ITL}_count", _is(path))
    return f"({rate(f'{ITL}_sum', _is(path))} / ({count} > 0))"


def _gain() -> Row:
    every = rate("turnout_tokens_total")
    share = or_zero(f"{rate('turnout_tokens_total', _is('merged'))} / ({every} > 0)")
    speedup = or_zero(f"{_mean_gap('adapter')} / ({_mean_gap('merged')} > 0)")
    per_token = f"({_mean_gap('adapter')} - {_mean_gap('merged')})"
    saved = or_zero(f"{per_token} * {rate('turnout_tokens_total', _is('merged'))}")

    def stat(title: str, says: str, expr: str, unit: str) -> Panel:
        return Panel(
            title=title,
            says=says,
            queries=(Query(expr),),
            kind="stat",
            unit=unit,
            width=8,
            height=5,
        )

    return Row(
        "What merging gives",
        (
            stat("Tokens on the merged path", "Their share of all tokens.", share, "percentunit"),
            stat(
                "Mean gap, adapter over merged",
                "How many times faster a merged stream's tokens come. 0: one path was not taken.",
                speedup,
                "none",
            ),
            stat(
                "Waiting saved",
                "Seconds of waiting that merging spares all readers together, a second. Below 0 it "
                "costs them: a step that runs both paths reads two sets of weights.",
                saved,
                "none",
            ),
        ),
    )


def _latency() -> Row:
    pictures = (
        ("Time to first token", TTFT, "From arrival to the first token."),
        ("Between tokens", ITL, "From one token to the next."),
        ("End to end", E2E, "From arrival to the last token; answers differ in length."),
    )
    return Row(
        "Latency by path",
        tuple(
            Panel(
                title=f"{title}, {word}",
                says=says,
                queries=_quantiles(q, histogram),
                unit="s",
            )
            for q, word in ((0.5, "median"), (0.99, "p99"))
            for title, histogram, says in pictures
        ),
    )


def _traffic() -> Row:
    def by_path(metric: str) -> tuple[Query, ...]:
        return tuple(Query(or_zero(rate(metric, _is(path))), path) for path in _PATHS)

    each = rate("turnout_adapter_tokens_total", OF_ADAPTER, by="adapter, path")
    waiting = quantile(0.9, "turnout_request_queue_time_seconds", by="path")
    kv = select("vllm:kv_cache_usage_perc")
    return Row(
        "Traffic by path",
        (
            Panel(
                title="Requests",
                says="Finished, a second.",
                queries=by_path(f"{E2E}_count"),
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Tokens",
                says="Generated, a second.",
                queries=by_path("turnout_tokens_total"),
                stacked=True,
            ),
            Panel(
                title="Tokens by adapter and path",
                says="A promoted adapter moves from `adapter` to `merged`.",
                queries=(Query(busiest(16, each), "{{adapter}} {{path}}"),),
                stacked=True,
            ),
            Panel(
                title="Queue, p90",
                says="Merged weights take memory from the KV cache: does the queue pay?",
                queries=(Query(waiting, "{{path}}"),),
                unit="s",
                width=12,
            ),
            Panel(
                title="KV cache in use",
                says="What merged weights leave room for.",
                queries=(Query(f"max by (instance) ({kv})", "{{instance}}"),),
                unit="percentunit",
                width=12,
                limits=(0.8, 0.95),
            ),
        ),
    )


def _promotions() -> Row:
    ended = rate("turnout_promotions_total", by="result", window="1h")
    return Row(
        "Promotions",
        (
            Panel(
                title="Under way",
                says="One works at a time; the others wait for it.",
                queries=(Query(total("turnout_promotion_running", by="instance"), "{{instance}}"),),
            ),
            Panel(
                title="Ended, an hour",
                says="failed: `turnout promote NAME --wait` and the job's log say why.",
                queries=(Query(f"{ended} * 3600", "{{result}}"),),
                stacked=True,
            ),
            Panel(
                title="Merged models in the engine",
                says="Bytes of the checkpoint of each weight set beside the base.",
                queries=(
                    Query(
                        total("turnout_weight_set_bytes", OF_ADAPTER, by="adapter"), "{{adapter}}"
                    ),
                ),
                unit="bytes",
                stacked=True,
            ),
        ),
    )
