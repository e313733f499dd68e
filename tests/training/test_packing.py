"""Packing: a document in company gives what it gives alone."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from training.loss import CHUNK_TOKENS, add_noise, attention_mask, summed_loss
from training.packing import IGNORED, Batch, collate, epoch_order, group_lengths, pack
from training.render import Example


def example(*ids: int, prompt: int = 1) -> Example:
    """A document whose first `prompt` tokens are not learned."""
    return Example(ids, tuple(index >= prompt for index in range(len(ids))), True)


def documents(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        example(*torch.randint(3, 250, (length,), generator=generator).tolist(), prompt=2)
        for length in lengths
    ]


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_base: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        tiny_base, attn_implementation=request.param
    )


@given(st.lists(st.integers(1, 20), max_size=40))
def test_every_document_is_packed_once_and_no_row_overflows(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)


def test_packing_fills_gaps_that_fit_best() -> None:
    assert pack([6, 7, 4, 3], 10) == [(1, 3), (0, 2)]
    assert pack([5, 8, 2, 4], 10) == [(1, 2), (0, 3)]


def test_a_document_past_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="11 tokens does not fit into 10"):
        pack([11], 10)


def test_labels_stand_where_their_token_is_predicted_and_never_cross_documents() -> None:
    docs = [example(5, 6, 7, prompt=2), example(8, 9)]
    batch = collate(docs, [(0, 1), (1,)], 0, is_packed=True)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [
        [IGNORED, 7, IGNORED, 9, IGNORED],
        [9, IGNORED, IGNORED, IGNORED, IGNORED],
    ]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]
    assert batch.num_learned == 3


def test_padding_that_is_the_end_of_turn_is_not_learned_and_the_end_is() -> None:
    batch = collate([example(5, 2), example(5, 6, 7, 2)], [(0,), (1,)], 2, is_packed=False)
    assert batch.ids.tolist() == [[5, 2, 2, 2], [5, 6, 7, 2]]
    assert batch.labels.tolist() == [[2, IGNORED, IGNORED, IGNORED], [6, 7, 2, IGNORED]]
    assert batch.mask() is None


def test_the_mask_is_causal_inside_each_document_and_leaves_no_token_blind() -> None:
    batch = collate([example(5, 6), example(7)], [(0, 1), (1,)], 0, is_packed=True)
    mask = batch.mask()
    assert mask is not None
    first = [[True, False, False], [True, True, False], [False, False, True]]
    assert mask[0, 0].tolist() == first
    assert mask[1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def hidden(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.model(
            input_ids=batch.ids,
            attention_mask=attention_mask(model, batch),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
    return found


def test_a_packed_document_has_the_logits_it_has_alone(model: Any) -> None:
    docs = documents(7, 12, 5, 9)
    packed = hidden(model, collate(docs, [(0, 1), (2, 3)], 0, is_packed=True))
    places = {0: (0, 0), 1: (0, 7), 2: (1, 0), 3: (1, 5)}
    for index, (row, start) in places.items():
        with torch.no_grad():
            alone = model(torch.tensor([docs[index].ids])).logits[0]
        ours = model.lm_head(packed[row, start : start + len(docs[index].ids)])
        torch.testing.assert_close(ours, alone, rtol=0, atol=2e-4)


def test_a_neighbours_tokens_change_nothing_bit_for_bit(model: Any) -> None:
    docs = documents(7, 12, 12)
    one = hidden(model, collate(docs, [(1, 0)], 0, is_packed=True))
    other = hidden(model, collate(docs, [(2, 0)], 0, is_packed=True))
    assert not torch.equal(one[0, :12], other[0, :12])
    assert torch.equal(one[0, 12:], other[0, 12:])


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_packed_rows_have_the_loss_and_gradients_of_unpacked_ones(model: Any) -> None:
    docs = documents(7, 12, 5)
    packed = summed_loss(model, collate(docs, [(0, 1, 2)], 0, is_packed=True))
    padded = summed_loss(model, collate(docs, [(0,), (1,), (2,)], 0, is_packed=False))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)
    pairs = zip(gradients(model, packed), gradients(model, padded), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_the_loss_is_that_of_transformers(model: Any) -> None:
    docs = documents(7, 12)
    batch = collate(docs, [(0,), (1,)], 0, is_packed=False)
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, 1:] = batch.labels[:, :-1]
    theirs = model(batch.ids, labels=labels).loss
    ours = summed_loss(model, batch) / batch.num_learned
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for one, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_chunks_change_neither_loss_nor_gradients(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(documents(9, 12), [(0, 1)], 0, is_packed=True)
    whole = summed_loss(model, batch)
    expected = gradients(model, whole)
    monkeypatch.setattr("training.loss.CHUNK_TOKENS", 4)
    chunked = summed_loss(model, batch)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    for one, other in zip(gradients(model, chunked), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert batch.num_learned < CHUNK_TOKENS


def test_attention_that_would_mix_documents_is_never_used(model: Any) -> None:
    batch = collate(documents(3, 4), [(0, 1)], 0, is_packed=True)
    assert attention_mask(model, batch) is not None
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AssertionError, match="would let packed documents see each other"):
        attention_mask(model, batch)


def test_noise_falls_on_embeddings_in_training_alone(model: Any) -> None:
    ids = torch.arange(3, 13).view(1, 10)
    embed = model.get_input_embeddings()
    clean = embed(ids)
    hook = add_noise(model, 5.0)
    model.eval()
    assert torch.equal(embed(ids), clean)
    model.train()
    gap = (embed(ids) - clean).abs().max()
    bound = 5.0 / (10 * 64) ** 0.5
    assert 0.8 * bound < gap <= bound * 1.0001
    hook.remove()
    assert torch.equal(embed(ids), clean)


def test_each_epoch_has_an_order_of_its_own_set_by_the_seed() -> None:
    rows = [(i,) for i in range(20)]
    orders = [epoch_order(rows, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == rows for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(rows, 1, 1) == orders[3]


@pytest.mark.parametrize("num_rows", [1, 8, 30, 31])
def test_grouped_batches_hold_rows_of_like_length(num_rows: int) -> None:
    lengths = [(7 * i) % 31 + 1 for i in range(num_rows)]
    order = epoch_order([(i,) for i in range(num_rows)], 0, 0)
    grouped = group_lengths(order, lengths, 4, 0, 0)
    assert sorted(grouped) == sorted(order)

    def padding(rows: list[tuple[int, ...]]) -> int:
        batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        return sum(max(lengths[r[0]] for r in b) - lengths[r[0]] for b in batches for r in b)

    assert padding(grouped) <= padding(order)
    if num_rows == 30:
        assert padding(grouped) < padding(order) / 3
        assert grouped != sorted(grouped, key=lambda row: -lengths[row[0]])  # batches are shuffled
        assert grouped != group_lengths(order, lengths, 4, 0, 1)
