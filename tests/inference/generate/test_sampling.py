"""What may be drawn, and how often it is."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.errors import ConfigError, RunError
from gptoughts.inference.generate.sampling import candidates, sample

rows = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)
settings_drawn = st.tuples(st.floats(0, 5), st.integers(0, 50), st.floats(0.01, 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=200, deadline=None)
@given(rows, settings_drawn, st.integers(1, 50))
def test_candidates_are_the_likeliest_and_a_distribution(row: list[float], drawn: tuple[float, int, float], limit: int) -> None:
    temperature, top_k, top_p = drawn
    ids, probabilities = candidates(torch.tensor(row), temperature, top_k, top_p, limit)
    assert 1 <= len(ids) == len(probabilities) <= min(top_k or 50, limit, len(row))
    assert ids.max() < limit
    assert probabilities.sum().item() == pytest.approx(1)
    order = sorted(range(min(limit, len(row))), key=lambda index: (-row[index], index))  # equal ones by ascending id
    assert ids.tolist() == order[: len(ids)]
    choice = sample(torch.tensor(row), temperature, top_k, top_p, generator(), limit)
    assert choice in ids
    if temperature == 0:
        assert choice == order[0]


@settings(max_examples=100, deadline=None)
@given(rows, st.floats(0.05, 1))
def test_top_p_keeps_the_fewest_that_reach_p(row: list[float], top_p: float) -> None:
    whole = torch.tensor(row, dtype=torch.float64).softmax(0).sort(descending=True).values
    kept = len(candidates(torch.tensor(row), 1.0, 0, top_p)[0])
    assert whole[: kept - 1].sum() < top_p + 1e-9
    assert whole[:kept].sum() > top_p - 1e-9


def test_draws_follow_the_softmax() -> None:
    logits, temperature, count = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0]), 1.5, 20_000
    source = generator()
    drawn = torch.tensor([sample(logits, temperature, 0, 1.0, source) for _ in range(count)])
    expected = (logits / temperature).softmax(0)
    found = drawn.bincount(minlength=5) / count
    chi_square = (count * (found - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.5  # 99.9 % of draws with 4 degrees of freedom


def test_filters_only_rescale_what_they_keep() -> None:
    logits = torch.randn(30, generator=generator())
    for words in ({"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.7}):
        ids, probabilities = candidates(logits, 0.9, words.get("top_k", 0), words.get("top_p", 1.0))
        kept = (logits.double() / 0.9).softmax(0)[ids]
        torch.testing.assert_close(probabilities, kept / kept.sum())
        assert 1 < len(ids) < 30


def test_padding_is_never_emitted_even_where_it_is_likeliest() -> None:
    logits = torch.cat([torch.zeros(10), torch.full((6,), 50.0)])
    source = generator()
    assert {sample(logits, 1.0, 0, 1.0, source, limit=10) for _ in range(300)} == set(range(10))
    assert sample(logits, 0, 0, 1.0, source, limit=10) == 0


def test_ties_take_the_smallest_id() -> None:
    logits = torch.zeros(1000)
    assert sample(logits, 0, 0, 1.0, generator()) == 0
    assert candidates(logits, 1.0, 3, 1.0)[0].tolist() == [0, 1, 2]
    logits[500] = 1
    assert candidates(logits, 1.0, 3, 1.0)[0].tolist() == [500, 0, 1]


def test_one_random_number_a_token() -> None:
    source, reference = generator(), generator()
    for words in ((1.0, 0, 1.0), (0.0, 0, 1.0), (0.5, 3, 0.4)):
        sample(torch.randn(50), *words, source)
        torch.rand((), generator=reference, dtype=torch.float64)
    assert torch.equal(source.get_state(), reference.get_state())


def test_low_precision_and_masked_logits_are_fine() -> None:
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 1.0], dtype=torch.bfloat16)
    source = generator()
    assert {sample(logits, 1e-30, 0, 1.0, source) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(RunError, match="not finite"):
        sample(torch.tensor([0.0, bad]), 1.0, 0, 1.0, generator())


@pytest.mark.parametrize("words", [(-1, 0, 1.0), (math.nan, 0, 1.0), (1, -1, 1.0), (1, 0, 0.0), (1, 0, 1.1)], ids=str)
def test_settings_out_of_range_are_refused(words: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        candidates(torch.zeros(4), *words)
