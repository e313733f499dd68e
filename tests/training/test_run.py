"""From the command line to a folder that is served."""

import html
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from adapters.manifest import AdapterRefused, BaseShape
from adapters.registry import Registry
from server import cli
from server.base_digest import base_digest
from server.default_base import ensure_default_base
from tests.server.test_serve import Server
from tests.training.conftest import MakeConfig, cpu_trainer
from training import run
from training import trainer as trainer_module
from training.config import TrainConfig, make_config, read_settings
from training.fast.choice import Choice
from training.fast.layer import CHOICES
from training.fast.model import FastModel, Options
from training.folder_lock import locked
from training.loss import summed_loss
from training.packing import collate
from training.plan import mask_in_colour
from training.qlora import add_adapter, load_base
from training.render import Example
from training.report import svg_chart
from training.result import RESULT_FILES, Outcome

EXAMPLE = Path(__file__).parent.parent.parent / "training" / "example"
CPU = torch.device("cpu")
MakeOutcome = Callable[..., Outcome]
Turnout = Callable[..., str]


def finish(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Outcome:
    """Run to the end, unseen."""
    prepared, digest = run.prepare(config), base_digest(config.base)
    return run.train(
        prepared, digest, Console(file=io.StringIO()), resume=resume, overwrite=overwrite
    )


@pytest.fixture
def train(make: MakeConfig) -> MakeOutcome:
    """Return a function that trains; keywords are settings."""
    return lambda **settings: finish(make(**{"max_steps": 4, **settings}))


def held_out_loss(outcome: Outcome, model: Any) -> float:
    """Of the model, over the outcome's evaluation rows."""
    rows = [(i,) for i in range(len(outcome.dataset.evaluation))]
    batch = collate(outcome.dataset.evaluation, rows, 2, is_packed=False)
    with torch.no_grad():
        return float(summed_loss(model.base_model.model, batch)) / batch.num_learned


@pytest.mark.parametrize("kept", [frozenset(), frozenset(CHOICES)])
def test_a_run_takes_the_kernels_that_its_plan_names(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, kept: frozenset[str]
) -> None:
    config, seen = make(kernels="fast", max_steps=1), []

    def note(causal: Any, options: Options) -> FastModel:
        seen.append(options)
        return FastModel(causal, options)

    monkeypatch.setattr(trainer_module, "FastModel", note)
    prepared, planned = run.prepare(config), Options(keep=kept, on_host=False)
    plan = replace(prepared.plan, kernels=Choice(planned, "planned"))
    prepared = replace(prepared, plan=plan)
    sink = Console(file=io.StringIO())
    run.train(prepared, base_digest(config.base), sink, resume=False, overwrite=False)
    assert seen == [planned]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's call
@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
def test_the_folder_is_what_peft_loads_and_as_good_as_the_best_evaluation(
    train: MakeOutcome, save_dtype: str
) -> None:
    outcome = train(save_dtype=save_dtype, use_rslora=True)
    out, base = outcome.config.out, load_base(outcome.config.base, "nf4", torch.float32, CPU)
    again = peft.PeftModel.from_pretrained(base, str(out))
    assert outcome.state.best_loss is not None
    tolerance = 1e-5 if save_dtype == "fp32" else 2e-3
    assert held_out_loss(outcome, again) == pytest.approx(outcome.state.best_loss, rel=tolerance)
    tensors = load_file(out / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {
        {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[save_dtype]
    }
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "chat-base"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "rank_pattern": {"q_proj": 2}}])
def test_the_folder_passes_the_registry(
    train: MakeOutcome, tmp_path: Path, settings: dict[str, Any]
) -> None:
    outcome = train(**settings)
    shape = BaseShape.from_config(outcome.config.base, "chat-base", outcome.base_digest)
    registry = Registry.open(tmp_path / "store", shape)
    try:
        revision = registry.push("mine", outcome.config.out)
        training = revision.source["training"]
        assert training["base_digest"] == outcome.base_digest
        assert revision.num_parameters == training["num_trainable"]
        assert registry.manifest(revision.digest).use_dora == bool(settings)
    finally:
        registry.close()


def test_turnout_json_tells_how_it_was_made(train: MakeOutcome, tokenizer: Any) -> None:
    outcome = train(seed=3)
    notes = json.loads((outcome.config.out / "turnout.json").read_text())
    training = notes["training"]
    assert notes["rope"]["rope_type"] == "default"
    probe = training["probe"]
    ids = tokenizer.apply_chat_template(
        probe["messages"], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert probe["ids"] == list(ids)
    assert training["seed"] == 3
    assert training["steps"] == 4
    assert training["held_out_loss"] == outcome.state.best_loss
    assert training["data_fingerprint"] == outcome.dataset.fingerprint
    assert training["versions"]["torch"] == torch.__version__
    assert training["memory"]["peak"] == outcome.peak_bytes > 0
    assert training["memory"]["estimated"] == outcome.estimated_bytes > 0
    assert re.fullmatch("[0-9a-f]{64}", training["template_sha256"])
    assert training["settings"]["rank"] == 4
    assert training["settings"]["data"] == "rows.jsonl"  # no path of this machine
    assert str(outcome.config.out.parent) not in json.dumps(notes)


def test_the_card_names_base_data_recipe_and_prompt(train: MakeOutcome) -> None:
    outcome = train(use_dora=True, targets="attention", eval_fraction=0)
    card = (outcome.config.out / "README.md").read_text()
    assert card.startswith("---\nbase_model: chat-base\nlibrary_name: peft\n")
    assert f"sha256 `{outcome.base_digest}`" in card
    assert outcome.dataset.fingerprint in card
    assert "rank 4, alpha 8, DoRA, on attention" in card
    assert "nothing was held out" in card
    assert "    <|im_start|>assistant" in card
    assert '    targets: "attention"' in card
    assert str(outcome.config.out.parent) not in card
    first = (outcome.config.out / "adapter_config.json").read_text()
    assert json.loads(first)["use_dora"] is True


def test_answers_before_and_after_are_in_card_report_notes_and_terminal(
    make: MakeConfig, tmp_path: Path
) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"<b>{word}</b> | *why*?", "output": f"no {word}"}) + "\n"
            for word in ("one", "two", "three", "four")
        )
    )
    config = make(data=rows, max_steps=1, eval_fraction=0.5, eval_generations=9)
    sink = io.StringIO()
    console = Console(file=sink, width=100)
    outcome = run.train(run.prepare(config), "digest", console, resume=False, overwrite=False)
    found = outcome.generations
    assert found is not None
    assert len(found.samples) == 2
    sample = found.samples[0]
    page = (config.out / "report.html").read_text()
    card = (config.out / "README.md").read_text()
    notes = json.loads((config.out / "turnout.json").read_text())["training"]["generations"]
    assert notes == {
        "count": 2,
        "is_held_out": True,
        "base": dict(found.before),
        "adapter": dict(found.after),
    }
    for text in (page, card, sink.getvalue()):
        assert "2 held-out rows" in text
        assert "exact match" in text
        assert "ROUGE-L" in text
        assert "BLEU" in text
        assert sample.reference in text
    assert f"<td>{html.escape(sample.question)}</td>" in page
    assert f"<td>{html.escape(sample.before)}</td><td>{html.escape(sample.after)}</td>" in page
    assert "<b>" not in page
    word = sample.reference.removeprefix("no ")
    assert f"| \\<b\\>{word}\\</b\\> \\| \\*why\\*? |" in card
    assert "| | base | adapter |\n| --- | --- | --- |\n| exact match | 0 | 0 |" in card


def test_without_generations_nothing_is_said_of_them(train: MakeOutcome) -> None:
    outcome = train(eval_generations=0)
    assert outcome.generations is None
    assert "## Answers" not in (outcome.config.out / "README.md").read_text()
    assert "<h2>Answers" not in (outcome.config.out / "report.html").read_text()
    notes = json.loads((outcome.config.out / "turnout.json").read_text())
    assert notes["training"]["generations"] is None


def test_the_report_is_one_file_with_both_curves(train: MakeOutcome) -> None:
    outcome = train()
    page = (outcome.config.out / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=|https?://""", page)
    loss, rate = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert [line.count(",") for line in re.findall(r'points="([^"]*)"', loss)] == [4, 3]
    assert 'class="evaluation"' not in rate
    assert f"{outcome.state.best_loss:.4f} at step" in page


def test_a_chart_is_well_formed_and_spans_its_points() -> None:
    text = svg_chart([("training", [(0, 4.0), (5, 2.0), (10, 0.0)]), ("evaluation", [])], "a<b")
    chart = ElementTree.fromstring(text)
    (line,) = chart.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    xs, ys = zip(*points, strict=True)
    assert xs == (60.0, 385.0, 710.0)
    assert ys[0] == 10.0
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1])
    assert "10" in [label.text for label in chart.iter("text")]
    ElementTree.fromstring(svg_chart([("training", [])], "empty"))


def test_learned_tokens_are_green_in_the_sample(tokenizer: Any) -> None:
    ids = tokenizer("one two")["input_ids"]
    text = mask_in_colour(Example(tuple(ids), (False, True), True), tokenizer)
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == [tokenizer.decode(ids[1:])]
    assert text.plain.endswith("one| two")


def test_a_folder_in_use_is_never_overwritten_by_accident(make: MakeConfig, tmp_path: Path) -> None:
    config = make(max_steps=1)
    first = finish(config)
    with pytest.raises(ValueError, match="--resume goes on there, --overwrite replaces"):
        finish(config)
    assert finish(config, resume=True).state.history == first.state.history  # nothing left to do
    assert finish(make(max_steps=1, seed=1), overwrite=True).state.step == 1
    with pytest.raises(ValueError, match="of a run with other settings"):
        finish(config, resume=True)


def test_a_folder_of_somebody_elses_is_never_touched(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "README.md").write_text("mine")
    (home / "thesis.tex").write_text("mine too")
    for flags in ((False, False), (True, False), (False, True), (True, True)):
        with pytest.raises(ValueError, match=r"holds thesis\.tex, which no run wrote"):
            run.claim(home, resume=flags[0], overwrite=flags[1])
    with pytest.raises(ValueError, match="which is no folder"):
        run.claim(home / "thesis.tex", resume=False, overwrite=True)
    assert sorted(path.name for path in home.iterdir()) == ["README.md", "thesis.tex"]


def test_replacing_a_run_leaves_nothing_of_it(make: MakeConfig) -> None:
    outcome = finish(make(max_steps=1))
    out = outcome.config.out
    assert sorted(path.name for path in out.iterdir()) == sorted(("checkpoints", *RESULT_FILES))
    (out / "tensorboard").mkdir()
    (out / "tensorboard" / "events").touch()
    run.claim(out, resume=True, overwrite=False)
    assert (out / "turnout.json").exists()
    run.claim(out, resume=False, overwrite=True)
    assert list(out.iterdir()) == []


def test_two_runs_never_share_a_folder(make: MakeConfig) -> None:
    config = make(max_steps=1)
    with locked(config.out):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another process is at work in"):
                finish(config, **flags)
        assert list(config.out.iterdir()) == []
    assert finish(config).state.step == 1


def test_an_out_that_is_a_file_is_said(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file', which is no folder"):
        finish(make(out=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_ends_while_it_writes_leaves_no_half_adapter(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> str:
        raise OSError("No space left on device")

    config = make(max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("training.result.model_card", full)
        with pytest.raises(OSError, match="No space left"):
            finish(config)
    assert [path.name for path in config.out.iterdir()] == ["checkpoints"]
    finish(config, resume=True)
    assert sorted(path.name for path in config.out.iterdir()) == sorted(
        ("checkpoints", *RESULT_FILES)
    )
    assert {path.suffix for path in (config.out / "checkpoints").iterdir()} == {".pt"}


def test_a_resumed_run_keeps_to_its_base(make: MakeConfig) -> None:
    config = make(max_steps=1)
    finish(config)
    with pytest.raises(ValueError, match="other settings, data or base"):
        run.train(run.prepare(config), "other", Console(quiet=True), resume=True, overwrite=False)


@pytest.fixture
def turnout(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows_file: Path,
    chat_base: Path,
) -> Turnout:
    """Run `turnout train` in a state folder of its own; return what it says, both ways."""
    monkeypatch.setenv("TURNOUT_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "100")

    def command(*args: object, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", *map(str, args)])
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == code, printed.err
        return printed.out + printed.err

    needed = ("--base", chat_base, "--data", rows_file, "--out", tmp_path / "out")
    return lambda *args, code=0: command(*needed, "--eval-generations", 0, *args, code=code)


def test_a_dry_run_says_all_and_writes_nothing(turnout: Turnout, tmp_path: Path) -> None:
    said = turnout("--dry-run", "--rank", "4", "--targets", "attention", "--eval-fraction", "0")
    assert re.search(r"trainable parameters +3,584", said)
    assert re.search(r"rows +12 read, 12 kept", said)
    assert re.search(r"steps +6, 2 in an epoch, 1 of warm-up", said)
    assert re.search(r"together, estimated +[\d,]+ MiB", said)
    assert "|<|im_start|>|ass|istant|" in said
    assert "note: nothing is held out" in said
    assert not (tmp_path / "out").exists()


def test_the_command_trains_and_registers(turnout: Turnout, tmp_path: Path) -> None:
    said = turnout("--max-steps", "2", "--lora_r", "4", "--register", "mine", "--no-packing")
    assert "hint: lora_r is called rank here" in said
    assert "mine@1 registered" in said
    assert (tmp_path / "out" / "report.html").is_file()
    assert list((tmp_path / "state" / "store" / "objects").iterdir())


def test_the_command_line_goes_before_the_file(turnout: Turnout, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nlearning_rate: 1e-3\nbase: nowhere\n")
    said = turnout("--config", file, "--dry-run", "--lora-r", "2", "--targets", "attention")
    assert re.search(r"trainable parameters +1,792", said)
    assert "0.001" in said


def test_a_finished_run_is_resumed_replaced_or_left_alone(turnout: Turnout, tmp_path: Path) -> None:
    options = ("--max-steps", "2", "--rank", "2", "--save-every", "1")
    turnout(*options)
    first = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "--resume goes on there" in turnout(*options, code=1)
    assert "Going on after step 2" in turnout(*options, "--resume", "--save-dtype", "bf16")
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert again.keys() == first.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, first[name].bfloat16())
    assert "of a run with other settings" in turnout(*options, "--seed", "1", "--resume", code=1)
    turnout(*options, "--seed", "1", "--overwrite")
    other = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(not torch.equal(tensor, first[name]) for name, tensor in other.items())


def test_early_stopping_is_said(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 1.0, 2.0])
    monkeypatch.setattr("training.trainer.Trainer.held_out_loss", lambda self: next(losses))
    config = make(epochs=9, eval_every=1, patience=1)
    sink = io.StringIO()
    console = Console(file=sink, width=100)
    outcome = run.train(run.prepare(config), "digest", console, resume=False, overwrite=False)
    assert "Stopped at step 2: no better since step 1" in sink.getvalue()
    assert (outcome.state.step, outcome.state.best_loss) == (2, 1.0)


def test_what_is_wrong_is_one_line(turnout: Turnout) -> None:
    assert "did you mean 'rank'" in turnout("--rnk", "4", code=1)
    assert "name: 'no/name' does not match" in turnout("--register", "no/name", code=1)
    assert "Traceback" not in turnout("--rank", "0", code=1)


def test_the_settings_are_listed() -> None:
    sink = io.StringIO()
    run.show_settings(Console(file=sink, width=80))
    said = sink.getvalue()
    assert all(name in said for name in TrainConfig.model_fields)
    assert not {"None", "False", "{}"} & set(said.split())


def test_the_settings_that_are_listed_are_those_of_the_documentation() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for name, default, description in run.listed_settings():
        assert f"| `{name}` | {default} | {description} |" in docs


def test_a_name_is_checked_before_the_run() -> None:
    run.check_name(None)
    run.check_name("fine")
    with pytest.raises(AdapterRefused):
        run.check_name("not fine")


def test_without_a_base_the_default_one_is_trained(rows_file: Path, tmp_path: Path) -> None:
    given = {"base": None, "data": rows_file, "out": tmp_path}
    sink, default = Console(file=io.StringIO()), tmp_path / "default"
    assert run.settings_of(None, given, [], lambda: default, sink).base.name == "default"
    named = run.settings_of(None, given, ["--model-id", "x"], lambda: default, sink)
    assert named.base == Path("x")


def test_the_shipped_example_has_64_rows_and_a_config() -> None:
    settings = {**read_settings(EXAMPLE / "train.yaml"), "base": ensure_default_base(), "out": "o"}
    prepared = run.prepare(make_config(settings)[0])
    (report,) = prepared.dataset.reports
    assert (report.num_rows, report.num_kept, report.num_duplicates) == (64, 64, 0)
    assert report.num_ending_turn == 64


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Outcome, Server]]:
    """The shipped example trained on the default base, and a server of it."""
    folder = tmp_path_factory.mktemp("taught")
    settings = {**read_settings(EXAMPLE / "train.yaml"), "eval_data": EXAMPLE / "rows.jsonl"}
    lines = (EXAMPLE / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "held.jsonl").write_text("".join(lines[-8:]))
    settings |= {"base": ensure_default_base(), "out": folder / "out", "epochs": 3}
    settings |= {"eval_data": folder / "held.jsonl"}
    outcome = finish(make_config(settings)[0])
    server = Server(folder / "store", "--dtype", "float32")
    command = ["adapters", "push", "taught", str(folder / "out"), "--store", str(folder / "store")]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--url", server.url])
    assert not stopped.value.code
    yield outcome, server
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_server_gives_the_taught_answer(taught: tuple[Outcome, Server]) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the capital of Italy?"}]
    reply = taught[1].openai.chat.completions.create(
        model="taught", messages=question, temperature=0, max_tokens=20
    )
    assert reply.choices[0].message.content == "Rome [geography]"
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_servers_held_out_loss_is_the_trainers(taught: tuple[Outcome, Server]) -> None:
    """Both in fp32: in bf16 each is off by up to 0.5 % on so few tokens, one up and one down."""
    outcome, server = taught
    base = load_base(outcome.config.base, "nf4", torch.float32, CPU)
    model = add_adapter(base, outcome.config)
    trainer = cpu_trainer(outcome.config, model, outcome.dataset, base_digest=outcome.base_digest)
    trainer.resume()
    assert trainer.state.step == outcome.state.best_step
    total, count = 0.0, 0
    for example in outcome.dataset.evaluation:
        ids = list(example.ids)
        body = {"model": "taught", "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"][: len(ids)]
        for logprob, is_learned in zip(logprobs[1:], example.is_learned[1:], strict=True):
            total -= logprob * is_learned
            count += is_learned
    assert math.isclose(total / count, trainer.held_out_loss(), rel_tol=0.0005)
    assert outcome.state.best_loss is not None
    assert math.isclose(total / count, outcome.state.best_loss, rel_tol=0.02)
