"""The Monte-Carlo bound is unbiased: it is what an enumeration of all masks, and of all orders, gives."""

from itertools import combinations, permutations
from math import comb, factorial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.eval.likelihood import Bound, bound, mask_counts, masks, text_bound
from gptoughts.models.family import FAMILIES, initialize
from gptoughts.models.gpt.gpt import GPT

VOCAB, MASK = 5, 5


@pytest.fixture(scope="module")
def model() -> GPT:
    config = ModelConfig(family="llada", depth=2, width=16, heads=2)
    built = FAMILIES["llada"].build(config, VOCAB + 1, 12)
    assert isinstance(built, GPT)
    initialize(built, FAMILIES["llada"], config, 0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)
    return built.eval()


def nats(model: GPT, prompt: list[int], target: list[int], masked: tuple[int, ...]) -> dict[int, float]:
    """Cross-entropy of each masked place of the target."""
    ids = [*prompt, *(MASK if place in masked else token for place, token in enumerate(target))]
    with torch.no_grad():
        shares = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    return {place: -shares[len(prompt) + place, target[place]].item() for place in masked}


def over_all_masks(model: GPT, prompt: list[int], target: list[int]) -> float:
    length, total = len(target), 0.0
    for count in range(1, length + 1):
        for masked in combinations(range(length), count):
            total += sum(nats(model, prompt, target, masked).values()) / count / comb(length, count)
    return total


def over_all_orders(model: GPT, prompt: list[int], target: list[int]) -> float:
    total = 0.0
    for order in permutations(range(len(target))):
        for written in range(len(order)):
            total += nats(model, prompt, target, order[written:])[order[written]]
    return total / factorial(len(target))


TARGETS = [([], [0, 3, 1, 4]), ([2, 2], [1, 0, 3]), ([], [4, 4])]


@pytest.mark.parametrize(("prompt", "target"), TARGETS)
def test_all_masks_are_all_orders(model: GPT, prompt: list[int], target: list[int]) -> None:
    assert over_all_masks(model, prompt, target) == pytest.approx(over_all_orders(model, prompt, target), rel=1e-5)


@pytest.mark.parametrize(("prompt", "target"), TARGETS)
def test_the_estimate_is_the_enumeration(model: GPT, prompt: list[int], target: list[int]) -> None:
    exact = over_all_masks(model, prompt, target)
    estimates = [bound(model, target, MASK, prompt=prompt, draws=128, seed=seed, rows=64) for seed in range(12)]
    values = np.array([estimate.nats for estimate in estimates])
    errors = np.array([estimate.standard_error for estimate in estimates])
    assert (errors > 0).all() and errors.max() < 0.5 * exact
    assert abs(values.mean() - exact) < 3.5 * errors.mean() / 12**0.5
    assert values.std() < 1.5 * errors.mean()  # systematic draws spread less than independent ones


def test_one_token_is_exact(model: GPT) -> None:
    one = bound(model, [3], MASK, prompt=[1, 2], draws=128)
    assert one.nats == pytest.approx(nats(model, [1, 2], [3], (0,))[0], rel=1e-5)
    assert (one.standard_error, one.tokens) == (0.0, 1)
    assert bound(model, [3], MASK, prompt=[1, 2], seed=9) == one


def test_it_is_a_bound(model: GPT) -> None:
    """Summed over every text of two tokens, the likelihoods that it stands for exceed no probability."""
    texts = [[a, b] for a in range(VOCAB) for b in range(VOCAB)]
    assert sum(np.exp(-over_all_masks(model, [], text)) for text in texts) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 10**6))
def test_counts_cover_the_range_and_masks_have_them(length: int, draws: int, seed: int, text: int) -> None:
    counts = mask_counts(length, draws, seed, text)
    assert counts.min() >= 1 and counts.max() <= length
    times = np.bincount(counts, minlength=length + 1)[1:]
    assert times.max() - times.min() <= (1 if draws % length == 0 or draws < length else 2)
    if draws % length == 0:
        assert (times == draws // length).all()
    chosen, again = masks(length, draws, seed, text)
    assert np.array_equal(counts, again) and np.array_equal(chosen.sum(axis=1), counts)


def test_every_place_and_count_is_equally_likely() -> None:
    found = np.zeros(6)
    counts = np.zeros(7)
    for text in range(1000):
        chosen, count = masks(6, 1, 0, text)
        found += chosen[0]
        counts[count] += 1
    assert abs(counts[1:] / 167 - 1).max() < 0.3
    assert abs(found / 1000 - 3.5 / 6).max() < 0.06


def test_masks_follow_seed_and_text_alone(model: GPT) -> None:
    same, other = (bound(model, [0, 1, 2, 3], MASK, seed=1, rows=rows) for rows in (16, 5))
    assert same.nats == pytest.approx(other.nats, rel=1e-5)  # whatever the forwards hold
    assert bound(model, [0, 1, 2, 3], MASK, seed=2).nats != same.nats
    assert bound(model, [0, 1, 2, 3], MASK, seed=1, text=1).nats != same.nats


def test_a_text_is_its_windows(model: GPT) -> None:
    ids = list(np.random.default_rng(0).integers(0, VOCAB, 29))
    whole = text_bound(model, ids, MASK, draws=16)
    parts = [bound(model, ids[start : start + 12], MASK, draws=16, text=number) for number, start in enumerate((0, 12, 24))]
    assert whole.tokens == 29
    assert whole.nats == pytest.approx(sum(part.nats for part in parts))
    assert whole.standard_error == pytest.approx(sum(part.standard_error**2 for part in parts) ** 0.5)
    assert whole.per(58) == (whole.nats / 58, whole.standard_error / 58)
    first = text_bound(model, ids, MASK, draws=16, limit=2)
    assert first.tokens == 24 and first.nats == pytest.approx(parts[0].nats + parts[1].nats)
    assert text_bound(model, ids[:6], MASK, draws=16, window=3).tokens == 6


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ({"draws": 1}, ConfigError, r"draws: must be at least 2, for a standard error\. Found 1"),
        ({"target": []}, DataError, "text: no tokens to evaluate"),
        ({"prompt": [0] * 9}, DataError, r"longer than the model's sequence_length of 12\. Found 13 tokens"),
        ({"prompt": [MASK]}, DataError, "text: contains the mask token 5"),
    ],
)
def test_what_cannot_be_asked_is_refused(model: GPT, words: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        bound(model, **{"target": [0, 1, 2, 3], "mask_id": MASK, **words})


def test_a_text_without_tokens_or_windows_is_refused(model: GPT) -> None:
    with pytest.raises(DataError, match="text: no tokens to evaluate"):
        text_bound(model, [], MASK)
    for words in ({"window": 0}, {"limit": 0}):
        with pytest.raises(ConfigError, match="window, limit: must be at least 1"):
            text_bound(model, [1, 2], MASK, **words)


def test_the_model_is_left_as_it_was(model: GPT) -> None:
    model.train()
    assert isinstance(bound(model, [1, 2], MASK, draws=4), Bound)
    assert model.training and torch.is_grad_enabled()
    model.eval()
