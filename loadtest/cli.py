"""`turnout loadtest …`: make traces, replay them, compare, find the knee."""

import asyncio
import signal
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from loadtest.compare import CompareOptions
from loadtest.compare import compare as run_comparison
from loadtest.demo import DemoOptions
from loadtest.demo import demo as run_demo
from loadtest.figures import Slo
from loadtest.gate import regressions, warnings
from loadtest.identity import listed_models
from loadtest.knee import KneeOptions, find_knee
from loadtest.page import write_page
from loadtest.progress import LiveProgress, say
from loadtest.report import Report, RunReport, read_report, write_report
from loadtest.run import RunOptions
from loadtest.run import run as run_trace
from loadtest.spec import parse_headers, parse_pairs, parse_range, parse_target
from loadtest.target import Endpoint, Prompt, Target, encode_payloads
from loadtest.trace import read_trace, trace_digest, write_trace
from loadtest.workload import Arrivals, Burst, Storm, Workload, cold_models, make_trace

app = typer.Typer(
    help="Load an OpenAI-compatible server, and report in figures and pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_OUT = Path(".turnout/loadtest")

Url = Annotated[str, typer.Option(help="The server, with or without /v1.")]
Out = Annotated[Path, typer.Option(help="Folder for report.json and report.html.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Repeatable, popular first. Default: all adapters listed."),
]
EndpointOption = Annotated[Endpoint, typer.Option(help="Which route is asked.")]
PromptOption = Annotated[
    Prompt, typer.Option(help="Common words, or token ids: exact, completions only.")
]
TokenIds = Annotated[str, typer.Option(help="Range of an ids prompt, FROM:TO.")]
Headers = Annotated[
    list[str] | None, typer.Option("--header", help="NAME:VALUE on every request; repeatable.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="TURNOUT_API_KEY", help="For the server.")]
TenantKeys = Annotated[
    list[str] | None, typer.Option("--tenant-key", help="TENANT=KEY of a trace; repeatable.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
IgnoreEos = Annotated[
    bool, typer.Option(help="Generate every token asked for (ours and vLLM's; not OpenAI's).")
]
TimeoutS = Annotated[float, typer.Option(min=0, help="For a whole reply.")]
Rate = Annotated[float, typer.Option(help="Requests per second.")]
DurationS = Annotated[float, typer.Option(help="Length of the trace.")]
Alpha = Annotated[float, typer.Option(help="Zipf's: 0 asks all alike, 1 the first most.")]
PromptTokens = Annotated[int, typer.Option(min=1)]
OutputTokens = Annotated[int, typer.Option(min=1)]
Spread = Annotated[float, typer.Option(help="Sigma of log-normal lengths; 0: all the same.")]
Seed = Annotated[int, typer.Option(help="One seed, one trace.")]
SloTtft = Annotated[float, typer.Option(help="Time to first token; 0: no limit.")]
SloTpot = Annotated[float, typer.Option(help="Mean time per token after it; 0: no limit.")]
SloE2e = Annotated[float, typer.Option(help="To the last token; 0: no limit.")]
Workers = Annotated[int, typer.Option(min=0, help="Sending processes; 0: as the load wants.")]
CheckShare = Annotated[float, typer.Option(help="Share of replies asked again alone.")]


@app.command()
def trace(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The trace, as JSONL.")],
    url: Url = DEFAULT_URL,
    model: Models = None,
    arrivals: Annotated[Arrivals, typer.Option(help="closed: users wait.")] = "poisson",
    rate: Rate = 1.0,
    duration_s: DurationS = 60.0,
    users: Annotated[int, typer.Option(help="Closed loop.")] = 1,
    requests_per_user: Annotated[int, typer.Option(help="Closed loop.")] = 10,
    alpha: Alpha = 1.0,
    drift_s: Annotated[float, typer.Option(help="Popularity moves on so often; 0: never.")] = 0,
    tenants: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 32,
    spread: Spread = 0.0,
    storm_size: Annotated[int, typer.Option(help="Cold adapters asked for at once.")] = 0,
    storm_at_s: Annotated[float, typer.Option(help="When.")] = 30.0,
    burst_rate: Annotated[float, typer.Option(help="One tenant's flood, per second.")] = 0.0,
    burst_at_s: Annotated[float, typer.Option(help="When.")] = 20.0,
    burst_s: Annotated[float, typer.Option(help="How long.")] = 10.0,
    payloads: Annotated[
        Path | None, typer.Option(help="Bodies with their times too, as aiperf replays them.")
    ] = None,
    endpoint: EndpointOption = "completions",
    prompt: PromptOption = "words",
    seed: Seed = 0,
) -> None:
    """Make a trace and write it to a file."""
    if arrivals == "closed":
        _refuse(context, "belongs to an open loop", "rate", "duration_s")
    else:
        _refuse(context, "belongs to --arrivals closed", "users", "requests_per_user")
    if not storm_size:
        _refuse(context, "wants a --storm-size", "storm_at_s")
    if not burst_rate:
        _refuse(context, "wants a --burst-rate", "burst_at_s", "burst_s")
    if payloads is None:
        _refuse(context, "wants --payloads, a file for them", "endpoint", "prompt")
    if model:
        _refuse(context, "is asked for models, and --model names them", "url")
    models = tuple(model or listed_models(Target(url=url)))
    storm = None
    if storm_size:
        models, cold = cold_models(models, storm_size)
        storm = Storm(at_s=storm_at_s, models=cold)
    burst = None
    if burst_rate:
        burst = Burst(at_s=burst_at_s, length_s=burst_s, rate=burst_rate, model=models[0])
    lines = make_trace(
        Workload(
            models=models,
            arrivals=arrivals,
            rate=rate,
            duration_s=duration_s,
            users=users,
            requests_per_user=requests_per_user,
            alpha=alpha,
            drift_s=drift_s or None,
            tenants=tenants,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            spread=spread,
            storm=storm,
            burst=burst,
            seed=seed,
        )
    )
    write_trace(out, lines)
    if payloads is not None:
        target = Target(endpoint=endpoint, prompt=prompt)
        payloads.write_bytes(encode_payloads(target, lines))
    _say(f"{len(lines)} requests for {len({line.model for line in lines})} models in {out}")


@app.command()
def run(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    trace: Annotated[Path | None, typer.Option(help="Replay this; else one is made.")] = None,
    model: Models = None,
    rate: Rate = 1.0,
    duration_s: DurationS = 60.0,
    alpha: Alpha = 1.0,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 32,
    spread: Spread = 0.0,
    seed: Seed = 0,
    endpoint: EndpointOption = "completions",
    prompt: PromptOption = "words",
    token_ids: TokenIds = "300:4000",
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = True,
    header: Headers = None,
    api_key: ApiKey = None,
    tenant_key: TenantKeys = None,
    timeout_s: TimeoutS = 120.0,
    slo_ttft_s: SloTtft = 1.0,
    slo_tpot_s: SloTpot = 0.2,
    slo_e2e_s: SloE2e = 0.0,
    check_share: CheckShare = 0.01,
    workers: Workers = 0,
    out: Out = DEFAULT_OUT,
    baseline: Annotated[
        Path | None, typer.Option(help="A stored report.json; exit with 1 if this is worse.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="How much worse is no worse.")] = 0.1,
) -> None:
    """Replay a trace and report. Exits with 1 where a reply was wrong, or none was whole.

    Ctrl-C stops it, and what is over by then is reported.
    """
    if trace is not None:
        made = ("model", "rate", "duration_s", "alpha", "prompt_tokens", "output_tokens", "spread")
        _refuse(context, "is of a trace that is made, and --trace gives one", *made)
    if prompt != "ids":
        _refuse(context, "wants --prompt ids", "token_ids")
    if baseline is None:
        _refuse(context, "wants a --baseline", "tolerance")
    target = Target(
        url=url,
        endpoint=endpoint,
        headers=parse_headers(header or ()),
        api_key=api_key,
        tenant_keys=parse_pairs(tenant_key or (), "--tenant-key"),
        prompt=prompt,
        token_ids=parse_range(token_ids),
        temperature=temperature,
        ignore_eos=ignore_eos,
        timeout_s=timeout_s,
    )
    stored = None if baseline is None else _stored_run(baseline)
    if baseline is not None and baseline.resolve() == (out / "report.json").resolve():
        raise ValueError(
            f"--baseline is {baseline}, which this run would write: name another --out"
        )
    _make_folder(out)
    if trace is not None:
        lines = read_trace(trace)
    else:
        workload = Workload(
            models=tuple(model or listed_models(target)),
            rate=rate,
            duration_s=duration_s,
            alpha=alpha,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            spread=spread,
            seed=seed,
        )
        lines = make_trace(workload)
    if unknown := set(target.tenant_keys) - {line.tenant for line in lines}:
        raise ValueError(f"--tenant-key is of {min(unknown)!r}, who is no tenant of the trace")
    if stored is not None and stored.trace.sha256 != trace_digest(lines):
        raise ValueError(f"--baseline {baseline} replayed another trace, so nothing could be said")
    options = RunOptions(
        slo=_slo(slo_ttft_s, slo_tpot_s, slo_e2e_s),
        check_share=check_share,
        num_workers=workers,
        seed=seed,
    )
    report = _watched(lambda watcher: run_trace(target, lines, options, watcher))
    if trace is None:
        write_trace(out / "trace.jsonl", lines)
    _leave(report, out)
    if not report.is_whole:
        raise typer.Exit(128 + signal.SIGINT)
    _judge(report, stored, tolerance)


@app.command()
def compare(
    context: typer.Context,
    adapter: Annotated[
        str | None, typer.Option(help="A: its adapter path, B: its merged path.")
    ] = None,
    a: Annotated[str, typer.Option(help="What A is: model=M,url=U,header=NAME:VALUE,path=P.")] = "",
    b: Annotated[str, typer.Option(help="The same for B.")] = "",
    url: Url = DEFAULT_URL,
    batch: Annotated[
        list[int] | None, typer.Option(help="Requests under way; repeatable. Default: 1, 8, 32.")
    ] = None,
    blocks: Annotated[int, typer.Option(help="Of each side, taking turns.")] = 10,
    requests_per_user: Annotated[int, typer.Option(min=1, help="In each block.")] = 2,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 64,
    endpoint: EndpointOption = "completions",
    prompt: PromptOption = "words",
    token_ids: TokenIds = "300:4000",
    api_key: ApiKey = None,
    timeout_s: TimeoutS = 120.0,
    merged_gib: Annotated[float, typer.Option(min=0, help="What the merged weights take.")] = 0.0,
    kv_gib: Annotated[float, typer.Option(min=0, help="The KV cache they take it from.")] = 0.0,
    workers: Workers = 0,
    seed: Seed = 0,
    out: Out = DEFAULT_OUT,
) -> None:
    """Compare two ways to be served; say when merging pays. They take turns, block by block."""
    if prompt != "ids":
        _refuse(context, "wants --prompt ids", "token_ids")
    if merged_gib and not kv_gib:
        raise ValueError("--merged-gib is the part of a KV cache: give --kv-gib too")
    default = Target(
        url=url,
        endpoint=endpoint,
        api_key=api_key,
        prompt=prompt,
        token_ids=parse_range(token_ids),
        timeout_s=timeout_s,
    )
    names, targets = _sides(default, adapter, a, b)
    options = CompareOptions(
        batches=tuple(sorted(set(batch or (1, 8, 32)))),
        num_blocks=blocks,
        requests_per_user=requests_per_user,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        memory_share=merged_gib / kv_gib if kv_gib else 0.0,
        num_workers=workers,
        seed=seed,
    )
    _make_folder(out)
    models = (adapter or targets[0].model or targets[1].model or "",)
    report = _watched(lambda watcher: run_comparison(names, targets, models, options, watcher))
    _leave(report, out)
    if report.is_void:
        raise typer.Exit(1)


@app.command()
def knee(
    url: Url = DEFAULT_URL,
    model: Models = None,
    low: Annotated[float, typer.Option(help="Requests per second to begin with.")] = 0.5,
    high: Annotated[float, typer.Option(help="And to end with at the latest.")] = 64.0,
    goal: Annotated[float, typer.Option(help="Share of requests within the SLO.")] = 0.95,
    precision: Annotated[float, typer.Option(help="How close, relatively.")] = 0.1,
    duration_s: DurationS = 20.0,
    alpha: Alpha = 1.0,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 32,
    endpoint: EndpointOption = "completions",
    api_key: ApiKey = None,
    timeout_s: TimeoutS = 120.0,
    slo_ttft_s: SloTtft = 1.0,
    slo_tpot_s: SloTpot = 0.2,
    slo_e2e_s: SloE2e = 0.0,
    workers: Workers = 0,
    seed: Seed = 0,
    out: Out = DEFAULT_OUT,
) -> None:
    """Find the highest rate at which the SLO holds, by bisection. Exits with 1 without one."""
    target = Target(url=url, endpoint=endpoint, api_key=api_key, timeout_s=timeout_s)
    workload = Workload(
        models=tuple(model or listed_models(target)),
        duration_s=duration_s,
        alpha=alpha,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
    )
    options = KneeOptions(
        slo=_slo(slo_ttft_s, slo_tpot_s, slo_e2e_s),
        goal=goal,
        low=low,
        high=high,
        tolerance=precision,
        num_workers=workers,
    )
    _make_folder(out)
    report = _watched(lambda watcher: find_knee(target, workload, options, watcher))
    _leave(report, out)
    if report.is_void:
        raise typer.Exit(1)


@app.command()
def page(
    report: Annotated[Path, typer.Argument(help="A report.json.")],
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html beside it.")
    ] = None,
) -> None:
    """Draw the page of a stored report again."""
    page = out or report.with_name("report.html")
    write_page(page, read_report(report))
    _say(f"{page} written")


@app.command()
def demo(
    adapters: Annotated[int, typer.Option(min=1, help="Registered before.")] = 20,
    rate: Rate = 1.5,
    duration_s: DurationS = 60.0,
    alpha: Alpha = 1.0,
    bank_rows: Annotated[int, typer.Option(help="Of the server's bank: 8 hold one.")] = 96,
    slo_ttft_s: SloTtft = 2.0,
    slo_tpot_s: SloTpot = 0.3,
    check_share: CheckShare = 0.05,
    out: Out = DEFAULT_OUT,
) -> None:
    """Serve the default base with many adapters, load it, and report."""
    options = DemoOptions(
        num_adapters=adapters, rate=rate, duration_s=duration_s, alpha=alpha, bank_rows=bank_rows
    )
    run_options = RunOptions(slo=_slo(slo_ttft_s, slo_tpot_s, 0.0), check_share=check_share)
    _make_folder(out)
    report = _watched(lambda watcher: run_demo(options, run_options, watcher))
    _leave(report, out)
    _judge(report, None, 0.0)


_Report = TypeVar("_Report", bound=Report)


def _sides(
    default: Target, adapter: str | None, a: str, b: str
) -> tuple[tuple[str, str], tuple[Target, Target]]:
    """Both targets of a comparison.

    With an adapter A and B are the same model name, which both paths answer under. The path is
    asked for in the header that the reply names it in, and a reply by another path voids the
    comparison. What --a and --b say comes on top.
    """
    if adapter is None:
        if not a or not b:
            raise ValueError("name an --adapter, or both --a and --b")
        (a_name, first), (b_name, second) = (
            parse_target(spec, default, name) for spec, name in ((a, "A"), (b, "B"))
        )
        if not (first.model or second.model):
            raise ValueError("neither --a nor --b names a model")
        return (a_name, b_name), (first, second)
    found = []
    for path, spec in (("adapter", a), ("merged", b)):
        forced = f"model={adapter},path={path},header=x-serving-path:{path}"
        found.append(parse_target(f"{forced},{spec}", default, path))
    (a_name, first), (b_name, second) = found
    return (a_name, b_name), (first, second)


def _slo(ttft_s: float, tpot_s: float, e2e_s: float) -> Slo:
    """Zero is no limit."""
    return Slo(ttft_s=ttft_s or None, tpot_s=tpot_s or None, e2e_s=e2e_s or None)


def _stored_run(path: Path) -> RunReport:
    report = read_report(path)
    if not isinstance(report, RunReport):
        raise ValueError(f"{path} is a report of another kind; --baseline takes a run's")
    return report


def _refuse(context: typer.Context, why: str, *names: str) -> None:
    """Raise ValueError if an option was typed that would do nothing here."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def _make_folder(out: Path) -> None:
    """Make the folder of the report. What forbids it is found out before the load, not after."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def _watched(work: Callable[[LiveProgress], Coroutine[Any, Any, _Report]]) -> _Report:
    """Do the work while the terminal shows how it goes. SIGTERM ends it as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with LiveProgress(Console(stderr=True)) as watcher:
            return asyncio.run(work(watcher))
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(report: Report, out: Path) -> None:
    """Write the report's JSON and its page, and say what it comes to."""
    write_report(out / "report.json", report)
    write_page(out / "report.html", report)
    say(report, Console())
    _say(f"{out / 'report.html'} and {out / 'report.json'} written")


def _judge(report: RunReport, stored: RunReport | None, tolerance: float) -> None:
    """Exit with 1 if replies were wrong, none was whole, or they were worse than the stored run."""
    worse: Sequence[str] = []
    if stored is not None:
        worse = regressions(stored, report, tolerance)
        for change in warnings(stored, report):
            _say(f"differs from the stored run: {change}")
        for each in worse:
            Console(stderr=True).print(f"worse: {each}", style="red", markup=False)
    if worse or report.has_wrong_replies or not report.outcomes["ok"]:
        raise typer.Exit(1)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
