"""The dashboard *Service*: how much comes in, how fast it is answered, what is nearly full."""

from deploy.grafana.panels import Dashboard, Panel, Query, Row
from deploy.grafana.queries import (
    E2E,
    ITL,
    TTFT,
    WINDOW,
    busiest,
    mean,
    or_zero,
    quantile,
    rate,
    ratio,
    select,
    total,
)


def service() -> Dashboard:
    """Traffic, latency and saturation of one base and all its adapters."""
    rows = (_now(), _traffic(), _latency(), _time_spent(), _objectives(), _saturation())
    says = "Traffic, latency and saturation of Turnout."
    return Dashboard(uid="turnout-service", title="Turnout: Service", says=says, rows=rows)


def _stat(
    title: str, says: str, expr: str, unit: str = "short", limits: tuple[float, ...] = ()
) -> Panel:
    return Panel(
        title=title,
        says=says,
        queries=(Query(expr),),
        kind="stat",
        unit=unit,
        limits=limits,
        width=4,
        height=4,
    )


def _now() -> Row:
    used = f"max ({select('vllm:kv_cache_usage_perc')})"
    restarts = f"sum (increase({select('turnout_engine_restarts_total')}[1h]))"
    return Row(
        "Now",
        (
            _stat(
                "Servers that answer", "Prometheus' own view.", or_zero('sum (up{job="turnout"})')
            ),
            _stat("Requests running", "In the current step.", total("vllm:num_requests_running")),
            _stat(
                "Requests waiting",
                "Not in a step yet. Growing for minutes: TurnoutQueueGrowing.",
                total("vllm:num_requests_waiting"),
                limits=(8, 64),
            ),
            _stat("Tokens a second", "Generated, on every path.", rate("turnout_tokens_total")),
            _stat(
                "KV cache in use",
                "Of the fullest server. Past 95 % requests are put back to recompute.",
                used,
                unit="percentunit",
                limits=(0.8, 0.95),
            ),
            _stat(
                "Engine restarts",
                "In the last hour. Each one failed every running request.",
                restarts,
                limits=(0.5, 2),
            ),
        ),
    )


def _traffic() -> Row:
    finished = rate("vllm:request_success_total", by="finished_reason")
    return Row(
        "Traffic",
        (
            Panel(
                title="Requests by how they ended",
                says="stop: the model ended it. length: its limit did. abort: the client went.",
                queries=(Query(finished, "{{finished_reason}}"),),
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Requests by path",
                says="Finished on the base, the adapter and the merged path.",
                queries=(Query(rate(f"{E2E}_count", by="path"), "{{path}}"),),
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Errors by code",
                says="Refused or failed, on any route. 503 and 429 are overload; 500 is ours.",
                queries=(Query(rate("turnout_errors_total", by="code"), "{{code}}"),),
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Tokens by path",
                says="Generated tokens a second.",
                queries=(Query(rate("turnout_tokens_total", by="path"), "{{path}}"),),
                stacked=True,
            ),
            Panel(
                title="Prompt and generated tokens",
                says="Tokens a second, in and out.",
                queries=(
                    Query(rate("vllm:prompt_tokens_total"), "prompt"),
                    Query(rate("vllm:generation_tokens_total"), "generated"),
                ),
            ),
            Panel(
                title="Tokens of a request",
                says="Means: how long prompts and answers are.",
                queries=(
                    Query(mean("turnout_request_prompt_tokens", by="path"), "prompt, {{path}}"),
                    Query(
                        mean("turnout_request_generation_tokens", by="path"), "generated, {{path}}"
                    ),
                ),
            ),
        ),
    )


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(
        Query(quantile(q, histogram, by="path"), f"p{round(q * 100)} {{{{path}}}}")
        for q in (0.5, 0.9, 0.99)
    )


def _latency() -> Row:
    heat = f"sum by (le) (increase({select(f'{TTFT}_bucket')}[{WINDOW}]))"
    return Row(
        "Latency (0 where nothing was served)",
        (
            Panel(
                title="Time to first token",
                says="From arrival to the first token, queue and adapter load included.",
                queries=_quantiles(TTFT),
                unit="s",
            ),
            Panel(
                title="Between tokens",
                says="From one token to the next, as a stream's reader sees it.",
                queries=_quantiles(ITL),
                unit="s",
            ),
            Panel(
                title="End to end",
                says="From arrival to the last token.",
                queries=_quantiles(E2E),
                unit="s",
            ),
            Panel(
                title="Time to first token, all of it",
                says="Two bands are two kinds of request: adapters in the bank, and those loaded.",
                queries=(Query(heat, "{{le}}"),),
                kind="heatmap",
                unit="s",
                width=24,
            ),
        ),
    )


def _time_spent() -> Row:
    parts = ("queue", "prefill", "decode")
    return Row(
        "Where a request's time goes",
        tuple(
            Panel(
                title=f"Mean time in {part}",
                says=says,
                queries=(
                    Query(mean(f"turnout_request_{part}_time_seconds", by="path"), "{{path}}"),
                ),
                unit="s",
            )
            for part, says in zip(
                parts,
                (
                    "Until a step first had it: full steps, a full bank, an adapter's load.",
                    "From leaving the queue to the first token.",
                    "From the first token to the last.",
                ),
                strict=True,
            )
        ),
    )


def _objectives() -> Row:
    def burn(title: str, says: str, record: str) -> Panel:
        windows = ("5m", "1h", "6h")
        queries = tuple(
            Query(f"{record}:ratio_rate{window} / 0.01", f"{window} {{{{path}}}}")
            for window in windows
        )
        return Panel(title=title, says=says, queries=queries, width=12, limits=(6, 14.4))

    return Row(
        "Objectives: 1 spends the budget just in time",
        (
            burn(
                "First tokens later than 1 s: burn rate",
                "Over 14.4 for an hour pages, over 6 for six hours is a ticket.",
                "path:turnout_first_token_late",
            ),
            burn(
                "Token gaps longer than 100 ms: burn rate",
                "Over 14.4 for an hour pages, over 6 for six hours is a ticket.",
                "path:turnout_token_gap_long",
            ),
        ),
    )


def _saturation() -> Row:
    hits = ratio(rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total"))
    steps = rate("turnout_engine_steps_total")
    shape = select("vllm:cache_config_info")
    kv_tokens = f"sum by (instance, num_gpu_blocks, block_size) ({shape})"
    by_instance = "{{instance}}"
    return Row(
        "Saturation",
        (
            Panel(
                title="Running and waiting",
                says="Waiting requests mean full steps, a full bank or a full KV cache.",
                queries=(
                    Query(
                        total("vllm:num_requests_running", by="instance"), f"running {by_instance}"
                    ),
                    Query(
                        total("vllm:num_requests_waiting", by="instance"), f"waiting {by_instance}"
                    ),
                ),
            ),
            Panel(
                title="KV cache in use",
                says="Nearly 1 for minutes: TurnoutKvNearlyFull.",
                queries=(
                    Query(f"max by (instance) ({select('vllm:kv_cache_usage_perc')})", by_instance),
                ),
                unit="percentunit",
                limits=(0.8, 0.95),
            ),
            Panel(
                title="Preemptions",
                says="Requests a second put back to recompute, for want of KV blocks.",
                queries=(Query(rate("vllm:num_preemptions_total", by="instance"), by_instance),),
            ),
            Panel(
                title="Prompt tokens found in the prefix cache",
                says="The share that needed no prefill.",
                queries=(Query(hits, "found"),),
                unit="percentunit",
            ),
            Panel(
                title="Mean time of a step",
                says="What every running request waits for its next token.",
                queries=(Query(ratio(rate("turnout_engine_step_seconds_total"), steps), "step"),),
                unit="s",
            ),
            Panel(
                title="Steps a second",
                says="0 is an idle engine, or a stuck one: see requests running.",
                queries=(Query(steps, "steps"),),
            ),
            Panel(
                title="Shape of the KV cache",
                says="Blocks and tokens in each; the value is 1.",
                queries=(
                    Query(kv_tokens, "{{num_gpu_blocks}} blocks of {{block_size}}, {{instance}}"),
                ),
                kind="stat",
                height=6,
            ),
            Panel(
                title="Seconds since the drain began",
                says="0: not draining. Past the dashed limit: TurnoutDrainStuck.",
                queries=(
                    Query(busiest(10, select("turnout_drain_seconds")), by_instance),
                    Query(
                        busiest(10, select("turnout_drain_limit_seconds")), f"limit {by_instance}"
                    ),
                ),
                unit="s",
                height=6,
            ),
            Panel(
                title="Growth of the queue",
                says="Requests a second, over ten minutes.",
                queries=(Query("instance:turnout_queue:deriv10m", by_instance),),
                height=6,
            ),
        ),
    )
