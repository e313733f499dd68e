"""What a run shows: live on a terminal, line by line in a log."""

import io
import re

import torch
from rich.console import Console

from training.checkpoint import RunState
from training.metrics import Generations, Sample
from training.progress import Display, figures, peak_bytes, shortened, show_generations

CPU = torch.device("cpu")
RECORD = {"loss": 1.25, "learning_rate": 2e-4, "tokens": 300, "seconds": 0.5}


def test_progress_is_said_in_loss_rate_speed_and_memory() -> None:
    state = RunState(step=2, history=[{**RECORD, "tokens": 100}, RECORD])
    assert figures(state, CPU).startswith("loss 1.250  lr 2.0e-04  400 tok/s  ")
    state.evaluations.append({"step": 2, "loss": 1.5})
    assert "(held out 1.500)" in figures(state, CPU)
    assert 1e8 < peak_bytes(CPU) < 1e12


def shown(*, is_terminal: bool, steps: range, num_steps: int, width: int = 80) -> str:
    """What a run prints, with every escape that moves the cursor."""
    sink = io.StringIO()
    console = Console(file=sink, width=width, force_terminal=is_terminal, height=40)
    with Display(console, CPU, num_steps) as display:
        for step in steps:
            display.update(RunState(step=step, history=[RECORD]))
        display.answered(3, 8)
    return sink.getvalue()


def test_a_terminal_shows_a_bar_the_rest_of_the_time_and_the_latest_figures() -> None:
    said = re.sub(
        r"\x1b\[[\d;?]*[A-Za-z]", "", shown(is_terminal=True, steps=range(5), num_steps=8)
    )
    last = said.replace("\r", "\n").rstrip().splitlines()[-3:]
    assert re.search(r"^Training +━.*4/8 +\d:\d\d:\d\d ETA [-\d:]+$", last[0].rstrip())
    assert re.search(r"^Generating +━.*3/8 ", last[1])
    assert re.search(r"^loss 1\.250  lr 2\.0e-04  600 tok/s  \d+\.\d GiB$", last[2].rstrip())
    assert max(map(len, last)) <= 80
    assert "step 4/8" not in said


def test_a_log_gets_twenty_lines_and_the_last_step() -> None:
    said = shown(is_terminal=False, steps=range(1, 106), num_steps=105)
    lines = said.splitlines()
    assert [line.split()[1] for line in lines] == [
        *(f"{step}/105" for step in range(5, 105, 5)),
        "105/105",
    ]
    assert lines[0].startswith("step 5/105  loss 1.250  lr 2.0e-04")
    assert "\x1b" not in said


def test_a_resumed_run_counts_from_its_step() -> None:
    sink = io.StringIO()
    with Display(Console(file=sink, width=80, force_terminal=True), CPU, 8) as display:
        display.resumed(6)
        display.say("[red]as it is")
    said = re.sub(r"\x1b\[[\d;]*m", "", sink.getvalue())
    assert "6/8" in said
    assert "Going on after step 6" in said
    assert "[red]as it is" in said


def test_answers_stand_beside_their_reference() -> None:
    sample = Sample(question="[b]Why?", reference="so", before="no\nidea " * 40, after="so")
    scores = {"exact match": 0.25, "BLEU": 12.345}
    found = Generations(
        samples=(sample,) * 9,
        is_held_out=True,
        before=scores,
        after=dict.fromkeys(scores, 1.0),
    )
    sink = io.StringIO()
    show_generations(found, Console(file=sink, width=100))
    said = sink.getvalue()
    assert "9 held-out rows" in said
    assert re.search(r"exact match +0\.25 +1", said)
    assert re.search(r"BLEU +12\.3 +1", said)
    assert said.count("[b]Why?") == 5
    assert max(map(len, said.splitlines())) <= 100
    assert shortened(sample.before, 10) == "no idea n…"
    assert shortened("a  b", 3) == "a b"
