"""PromQL for panels. Every expression is finite from the first two scrapes on.

    a ratio      x / (y > 0) or y * 0          0 where y is 0, whatever a scrape saw of x
    a quantile   histogram_quantile(…) >= 0    drops the NaN of a histogram that saw nothing
    a path       … or vector(0)                the merged path may never have been taken

`$instance` and `$adapter` are the dashboards' variables, `$__rate_interval` is Grafana's own.
"""

WINDOW = "$__rate_interval"
TTFT = "turnout_time_to_first_token_seconds"
ITL = "turnout_inter_token_latency_seconds"
E2E = "turnout_e2e_request_latency_seconds"
OF_INSTANCE = 'instance=~"$instance"'
OF_ADAPTER = 'adapter=~"$adapter"'


def select(metric: str, *matchers: str) -> str:
    """The metric's series on the chosen instances."""
    return f"{metric}{{{','.join((OF_INSTANCE, *matchers))}}}"


def total(metric: str, *matchers: str, by: str = "") -> str:
    """The sum of a gauge, for each value of the labels `by`."""
    return f"sum{_by(by)} ({select(metric, *matchers)})"


def rate(metric: str, *matchers: str, by: str = "", window: str = WINDOW) -> str:
    """How fast a counter grows, per second."""
    return f"sum{_by(by)} (rate({select(metric, *matchers)}[{window}]))"


def ratio(part: str, whole: str) -> str:
    """`part / whole`, and 0 where `whole` is. Both carry the same labels."""
    return f"{part} / ({whole} > 0) or {whole} * 0"


def mean(metric: str, *matchers: str, by: str = "") -> str:
    """The mean observation of a histogram or a summary."""
    return ratio(rate(f"{metric}_sum", *matchers, by=by), rate(f"{metric}_count", *matchers, by=by))


def quantile(q: float, histogram: str, *matchers: str, by: str = "") -> str:
    """A quantile of a histogram, and 0 where it saw nothing."""
    buckets = rate(f"{histogram}_bucket", *matchers, by=f"le, {by}" if by else "le")
    return f"histogram_quantile({q}, {buckets}) >= 0 or {nothing(histogram, *matchers, by=by)}"


def nothing(histogram: str, *matchers: str, by: str = "") -> str:
    """0 for each series that a quantile or a mean of this histogram would have."""
    return f"{rate(f'{histogram}_count', *matchers, by=by)} * 0"


def or_zero(expr: str) -> str:
    """0 where there is no series at all."""
    return f"{expr} or vector(0)"


def busiest(count: int, expr: str) -> str:
    """The series of the largest values."""
    return f"topk({count}, {expr})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
