"""A step's tensors, against what a plain reading of the plan says."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.rope import RopeScaling
from server.engine.batch import build_input, num_logits
from server.engine.request import AdapterRef, Request, SamplingParams
from server.engine.scheduler import Plan, Scheduled
from server.model.decoder import ModelInput

BLOCK_SIZE = 4
PAGE_ROWS = 2
NO_TOKENS = torch.zeros(4, dtype=torch.int64)


class Adapters:
    """What `build_input` asks of the adapter cache, with pages set by hand."""

    def __init__(
        self,
        pages: dict[str, list[int]] | None = None,
        gain: dict[str, int] | None = None,
        tables: dict[str, int] | None = None,
    ) -> None:
        self._pages = pages or {}
        self._gain = gain or {}
        self._tables = tables or {}

    def table(self, digest: str) -> int:
        return self._tables[digest]

    def pages(self, digest: str) -> list[int]:
        return self._pages[digest]

    def rows(self, digest: str) -> list[int]:
        return [page * PAGE_ROWS + row for page in self._pages[digest] for row in range(PAGE_ROWS)]

    def gain_row(self, digest: str) -> int | None:
        return self._gain.get(digest)


def make_request(
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    adapter: str | None = None,
    rope: RopeScaling | None = None,
    table: Sequence[int] = (0, 1, 2, 3, 4, 5),
    state_row: int = 0,
    num_pending: int = 0,
    prompt_logprobs: int | None = None,
) -> Request:
    return Request(
        request_id="r",
        prompt_ids=list(prompt),
        output_ids=list(output),
        sampling=SamplingParams(max_tokens=16, prompt_logprobs=prompt_logprobs),
        adapter=AdapterRef(adapter, 1, rope) if adapter else None,
        tenant="",
        arrival_time=0.0,
        seed=0,
        block_table=list(table),
        state_row=state_row,
        num_pending=num_pending,
    )


def decode(request: Request, start: int) -> Scheduled:
    return Scheduled(request, start, 1, samples=True)


def chunk(request: Request, start: int, num_tokens: int, *, samples: bool = False) -> Scheduled:
    return Scheduled(request, start, num_tokens, samples)


def build(
    decodes: Sequence[Scheduled] = (),
    chunks: Sequence[Scheduled] = (),
    *,
    adapters: Adapters | None = None,
    last_tokens: torch.Tensor = NO_TOKENS,
) -> ModelInput:
    plan = Plan(tuple(decodes), tuple(chunks))
    return build_input(plan, adapters or Adapters(), last_tokens, BLOCK_SIZE)  # type: ignore[arg-type]  # a fake


def allowed_rows(step: ModelInput, num_bank_rows: int) -> list[list[int]]:
    """Which bank rows each token may use, in the order in which the step gathers them."""
    num_tokens = step.token_ids.numel()
    if step.lora is None:
        return [[] for _ in range(num_tokens)]
    rows = torch.arange(num_bank_rows)[step.lora.rows].tolist()
    if step.lora.foreign is None:
        return [rows] * num_tokens
    assert step.lora.foreign.shape == (num_tokens, len(rows))
    return [
        [row for row, is_foreign in zip(rows, line, strict=True) if not is_foreign]
        for line in step.lora.foreign.tolist()
    ]


def test_tokens_lie_end_to_end_decode_rows_first() -> None:
    first = make_request([1, 2, 3], [4, 5], table=[7, 2])
    second = make_request([9, 8, 7, 6, 5, 4, 3], table=[5, 3])

    step = build([decode(first, 4)], [chunk(second, 2, 4)])

    assert step.token_ids.tolist() == [5, 7, 6, 5, 4]
    assert step.positions.tolist() == [4, 2, 3, 4, 5]
    assert step.slot_mapping.tolist() == [2 * 4 + 0, 5 * 4 + 2, 5 * 4 + 3, 3 * 4 + 0, 3 * 4 + 1]


def test_each_token_rotates_by_its_own_adapters_table() -> None:
    rope = RopeScaling(rope_type="linear", factor=2.0)
    adapters = Adapters({"a": [0], "b": [1]}, tables={"b": 2})
    base, plain = make_request([1, 2], [3]), make_request([1, 2], [3], adapter="a")
    scaled = make_request([9, 8, 7], adapter="b", rope=rope)

    mixed = build([decode(base, 2), decode(plain, 2)], [chunk(scaled, 0, 3)], adapters=adapters)

    assert mixed.tables is not None
    assert mixed.tables.tolist() == [0, 0, 2, 2, 2]
    assert build([decode(base, 2), decode(plain, 2)], adapters=adapters).tables is None


def test_a_chunk_may_run_from_the_prompt_into_the_committed_output() -> None:
    resumed = make_request([1, 2, 3], [4, 5, 6])

    step = build(chunks=[chunk(resumed, 1, 5, samples=True)])

    assert step.token_ids.tolist() == [2, 3, 4, 5, 6]


def test_a_pending_token_comes_from_its_requests_state_row_on_the_device() -> None:
    waiting_for_it = make_request([1, 2], [3], state_row=2, num_pending=2)
    known = make_request([4, 5], [6], state_row=1, num_pending=1)
    last_tokens = torch.tensor([50, 51, 52, 53])

    step = build([decode(waiting_for_it, 3), decode(known, 2)], last_tokens=last_tokens)

    assert step.token_ids.tolist() == [52, 6]  # and never 51, which an earlier owner left there


def test_decode_rows_carry_their_tables_padded_and_their_lengths_with_the_new_token() -> None:
    short = make_request([1], [2], table=[9, 4])
    long = make_request(range(8), [1], table=[3, 8, 6, 1])

    attention = build([decode(short, 1), decode(long, 8)]).attention

    assert attention.decode is not None
    assert attention.decode.lengths.tolist() == [2, 9]
    assert attention.decode.block_tables.tolist() == [[9, 4, 0], [3, 8, 6]]
    assert attention.chunks == ()


def test_chunks_know_their_place_their_context_and_the_blocks_up_to_their_end() -> None:
    decoding = make_request([1], [2])
    first = make_request(range(20), table=[5, 4, 3, 2, 1])
    second = make_request(range(3), table=[8])

    attention = build([decode(decoding, 1)], [chunk(first, 4, 5), chunk(second, 0, 3)]).attention

    assert [(c.first, c.num_tokens, c.context) for c in attention.chunks] == [(1, 5, 4), (6, 3, 0)]
    assert [c.block_table.tolist() for c in attention.chunks] == [[5, 4, 3], [8]]


def test_a_step_without_decode_rows_says_so() -> None:
    assert build(chunks=[chunk(make_request([1, 2]), 0, 2)]).attention.decode is None


def test_only_sampled_tokens_need_logits() -> None:
    decoding = make_request([1], [2])
    middle = make_request(range(9))
    last = make_request([1, 2, 3])

    step = build([decode(decoding, 1)], [chunk(middle, 0, 4), chunk(last, 0, 3, samples=True)])

    assert step.logits_rows.tolist() == [0, 7]


def test_prompt_logprobs_need_the_logits_of_every_prompt_token() -> None:
    asked = make_request([1, 2, 3, 4], prompt_logprobs=1)
    plain = make_request([1, 2])

    step = build(chunks=[chunk(plain, 0, 2, samples=True), chunk(asked, 0, 3)])

    assert step.logits_rows.tolist() == [1, 2, 3, 4]


def test_prompt_logprobs_are_not_computed_again_after_a_preemption() -> None:
    resumed = make_request([1, 2, 3, 4], [5], prompt_logprobs=1)

    assert num_logits(chunk(resumed, 0, 5, samples=True)) == 1


def test_a_step_of_the_base_alone_touches_no_bank() -> None:
    assert build([decode(make_request([1], [2]), 1)]).lora is None


def test_one_adapter_for_every_token_needs_no_mask() -> None:
    request = make_request([1, 2, 3], adapter="a")

    lora = build(chunks=[chunk(request, 0, 3)], adapters=Adapters({"a": [1, 2]})).lora

    assert lora is not None
    assert (lora.rows, lora.foreign) == (slice(2, 6), None)


def test_beside_the_base_one_adapter_is_masked_from_the_bases_tokens() -> None:
    base = make_request([1], [2])
    other = make_request([3], [4], adapter="a")

    step = build([decode(base, 1), decode(other, 1)], adapters=Adapters({"a": [1]}))

    assert allowed_rows(step, 8) == [[], [2, 3]]


def test_each_token_may_use_its_own_adapters_rows_alone() -> None:
    adapters = Adapters({"a": [1], "b": [0, 2]})
    first = make_request([1], [2], adapter="b")
    second = make_request([1, 2, 3], adapter="a")

    step = build([decode(first, 1)], [chunk(second, 0, 2)], adapters=adapters)

    assert allowed_rows(step, 8) == [[0, 1, 4, 5], [2, 3], [2, 3]]


def test_scattered_pages_that_span_as_much_as_neighbours_are_gathered_one_by_one() -> None:
    """Pages 0, 9 | 1 | 3 end three after they begin, as 0, 1, 2, 3 do: no slice serves them."""
    adapters = Adapters({"a": [0, 9], "b": [1], "c": [3]})
    requests = [make_request([1], [2], adapter=digest) for digest in "abc"]

    step = build([decode(request, 1) for request in requests], adapters=adapters)

    assert allowed_rows(step, 20) == [[0, 1, 18, 19], [2, 3], [6, 7]]


def test_adapters_on_neighbouring_pages_need_no_gather_whichever_comes_first() -> None:
    adapters = Adapters({"a": [2], "b": [1], "c": [3]})
    parts = [decode(make_request([1], [2], adapter=digest), 1) for digest in "acb"]

    step = build(parts, adapters=adapters)

    assert step.lora is not None
    assert step.lora.rows == slice(2, 8)
    assert allowed_rows(step, 10) == [[4, 5], [6, 7], [2, 3]]


def test_gain_rows_name_the_tokens_of_dora_adapters_alone() -> None:
    adapters = Adapters({"plain": [0], "dora": [1], "other": [2]}, gain={"dora": 3, "other": 4})
    requests = [make_request([1, 2], [3], adapter=name) for name in ("dora", "plain", "other")]
    decodes = [decode(requests[0], 2), decode(requests[1], 2)]

    lora = build(decodes, [chunk(requests[2], 0, 2)], adapters=adapters).lora

    assert lora is not None
    assert lora.gain_tokens is not None
    assert lora.gain_rows is not None
    assert lora.gain_tokens.tolist() == [0, 2, 3]
    assert lora.gain_rows.tolist() == [3, 4, 4]


def test_without_dora_there_are_no_gain_rows() -> None:
    request = make_request([1], [2], adapter="a")

    lora = build([decode(request, 1)], adapters=Adapters({"a": [0]})).lora

    assert lora is not None
    assert (lora.gain_rows, lora.gain_tokens) == (None, None)


@st.composite
def page_layouts(draw: st.DrawFn) -> dict[str, list[int]]:
    """Up to three adapters on any pages, each one's in ascending order as the cache gives them."""
    pages = draw(st.permutations(range(6)))
    layout: dict[str, list[int]] = {}
    for digest in "abc"[: draw(st.integers(1, 3))]:
        count = draw(st.integers(1, 2))
        layout[digest], pages = sorted(pages[:count]), pages[count:]
    return layout


@settings(max_examples=300, deadline=None)
@given(layout=page_layouts(), owners=st.lists(st.sampled_from("abc_"), min_size=1, max_size=5))
def test_whatever_the_layout_every_token_uses_its_own_rows(
    layout: dict[str, list[int]], owners: list[str]
) -> None:
    owners = [owner if owner in layout else "" for owner in owners]
    adapters = Adapters(layout)
    parts = [decode(make_request([1], [2], adapter=owner or None), 1) for owner in owners]

    step = build(parts, adapters=adapters)

    expected = [adapters.rows(owner) if owner else [] for owner in owners]
    assert allowed_rows(step, 20) == expected
