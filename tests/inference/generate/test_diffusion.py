"""Denoising commits what its schedule says, block by block, each prompt for itself, and never writes the mask."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError, DataError, RunError
from gptoughts.inference.generate.diffusion import check, generate, schedule
from gptoughts.models.family import FAMILIES, initialize
from gptoughts.models.gpt.gpt import GPT
from tests.support.byte_models import FORMS, Bytes

ROWS, MASK = 320, 257


class WithMask(Bytes):
    """The same with a mask token of its own."""

    vocab_size = 258


def make(form: str = "modern", length: int = 32, family: str = "llada", **words: Any) -> GPT:
    config = ModelConfig(family=family, depth=2, width=32, heads=4, **{**FORMS[form], **words})
    model = FAMILIES[family].build(config, ROWS, length)
    assert isinstance(model, GPT)
    initialize(model, FAMILIES[family], config, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest) -> GPT:
    return make(request.param)


class Fixed(nn.Module):
    """Logits that depend on the place alone; keeps what it was shown."""

    sequence_length, vocab_size = 64, ROWS

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)  # places V
        self.shown: list[Tensor] = []

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        self.shown.append(input_ids.clone())
        return self.logits[: input_ids.shape[1]].expand(len(input_ids), -1, -1)


def sure(*tokens: int, sureness: list[float] | None = None, prompt: int = 0) -> Fixed:
    """A model that wants `tokens` behind a prompt, each with its own sureness."""
    logits = torch.zeros(64, ROWS)
    for place, token in enumerate(tokens):
        logits[prompt + place, token] = 10.0 if sureness is None else sureness[place]
    return Fixed(logits)


def history(model: Any, prompts: list[list[int]], tokenizer: Any = None, **words: Any) -> dict[int, list[list[int]]]:
    """What stood behind each prompt after each step."""
    seen: dict[int, list[list[int]]] = {index: [[MASK] * words["max_new_tokens"]] for index in range(len(prompts))}

    def keep(index: int, step: int, ids: list[int]) -> None:
        assert step == len(seen[index])
        seen[index].append(ids)

    generate(model, tokenizer or Bytes(), prompts, MASK, on_step=keep, stop_at_eot=False, **words)
    return seen


# --- the schedule


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_every_block_is_split_evenly(blocks: int, length: int, each: int) -> None:
    planned = schedule(blocks * length, blocks * each, length)
    assert sum(planned.commits) == length == planned.block_length
    assert len(planned.commits) == min(each, length)
    assert max(planned.commits) - min(planned.commits) <= 1
    assert list(planned.commits) == sorted(planned.commits, reverse=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((128, 128, 48), r"block_length: must divide the 128 new tokens\. Found 48\.\n  Try: block_length 32 or 64"),
        ((10, 5, 20), r"block_length: must divide the 10 new tokens\. Found 20\.\n  Try: block_length 10"),
        ((128, 30, 32), r"steps: must be a multiple of 4 blocks .*\. Found 30\.\n  Try: steps 28 or 32"),
        ((128, 3, 32), r"steps: must be a multiple of 4 blocks .*\. Found 3\.\n  Try: steps 4$"),
        ((0, 1, None), r"max_new_tokens: must be at least 1\. Found 0"),
        ((8, 0, None), r"steps: must be at least 1\. Found 0"),
        ((8, 8, 0), r"block_length: must be at least 1\. Found 0"),
    ],
)
def test_what_does_not_divide_is_told_with_the_nearest_that_does(words: tuple[int, int, int | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schedule(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"remasking": "low_confidence"}, r"remasking: must be low-confidence or random\. Found 'low_confidence'"),
        ({"temperature": -1.0}, r"temperature: must be 0 .*Found -1.0"),
        ({"temperature": float("nan")}, r"temperature: must be 0 .*Found nan"),
        ({"guidance": -0.5}, r"guidance: must be 0 .*Found -0.5"),
        ({"max_new_tokens": 33, "steps": 33}, r"max_new_tokens: must be at most the model's sequence_length 32\. Found 33"),
    ],
)
def test_settings_out_of_range_are_refused(words: dict[str, Any], said: str) -> None:
    usual = {"max_new_tokens": 8, "steps": 8, "block_length": None, "remasking": "random", "temperature": 0.0, "guidance": 0.0}
    with pytest.raises(ConfigError, match=said):
        check(**{**usual, **words}, sequence_length=32)
    with pytest.raises(ConfigError, match=said):
        generate(make(), Bytes(), ["a"], MASK, **{**usual, **words})


# --- what a step does


@pytest.mark.parametrize("remasking", ["low-confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("count", "steps", "block"), [(12, 6, 4), (12, 12, 12), (12, 8, 3), (10, 4, None), (5, 20, None)])
def test_steps_commit_what_is_planned_and_nothing_is_masked_again(
    model: GPT, remasking: Any, temperature: float, count: int, steps: int, block: int | None
) -> None:
    words = {"max_new_tokens": count, "steps": steps, "block_length": block, "remasking": remasking, "temperature": temperature}
    planned = schedule(count, steps, block)
    for states in history(model, [[1, 2, 3], [7]], **words).values():
        commits = planned.commits * (count // planned.block_length)
        for number, (before, after) in enumerate(pairwise(states)):
            written = [place for place in range(count) if before[place] != after[place]]
            assert all(before[place] == MASK for place in written)
            assert len(written) == commits[number]
            current = number // len(planned.commits)
            assert {place // planned.block_length for place in written} == {current}  # blocks from left to right
        assert len(states) == len(commits) + 1 and MASK not in states[-1]


def test_the_surest_come_first_and_ties_from_the_left() -> None:
    wanted = sure(65, 66, 67, 68, sureness=[3.0, 9.0, 9.0, 1.0])
    states = history(wanted, [[]], max_new_tokens=4, steps=4)[0]
    assert states[1:] == [
        [MASK, 66, MASK, MASK],
        [MASK, 66, 67, MASK],
        [65, 66, 67, MASK],
        [65, 66, 67, 68],
    ]


def test_confidence_is_of_the_clean_logits() -> None:
    """At a high temperature guesses are noise; a sure place whose guess was unlikely must wait for an unsure one."""
    logits = torch.zeros(64, ROWS)
    logits[0, 65] = 30.0  # any other guess here has a probability of e-30
    for seed in range(20):
        states = history(Fixed(logits), [[]], max_new_tokens=2, steps=2, temperature=40.0, seed=seed)[0]
        first = [place for place in range(2) if states[1][place] != MASK]
        guessed = states[2][0] == 65 and first == [0]
        assert first == [1] or guessed


def test_gumbel_noise_draws_from_the_softmax() -> None:
    logits = torch.full((64, ROWS), -30.0)
    logits[:, 65:69] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for temperature in (1.0, 0.5):
        drawn = [
            generate(Fixed(logits), Bytes(), [[]], MASK, 64, 1, temperature=temperature, seed=seed)[0] for seed in range(60)
        ]
        share = torch.tensor(drawn).flatten().bincount(minlength=ROWS)[65:69] / (60 * 64)
        expected = wanted ** (1 / temperature)
        assert (share - expected / expected.sum()).abs().max() < 0.04


def test_guidance_moves_away_from_what_needs_no_prompt() -> None:
    class Guided(Fixed):
        def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
            logits = torch.zeros(*input_ids.shape, ROWS)
            logits[..., 65] = 3.0
            logits[..., 66] = 2.0
            logits[(input_ids == 7).any(dim=1)] += torch.nn.functional.one_hot(torch.tensor(66), ROWS) * 0.6  # with the prompt
            return logits

    free = Guided(torch.zeros(1))
    assert generate(free, Bytes(), [[7]], MASK, 2, 2) == [[65, 65]]
    assert generate(free, Bytes(), [[7]], MASK, 2, 2, guidance=1.0) == [[66, 66]]  # 3.0 against 2 + 2 * 0.6
    assert generate(free, Bytes(), [[7], [7, 7, 7], []], MASK, 2, 2, guidance=1.0) == [[66, 66], [66, 66], [65, 65]]


# --- what must never be written


@pytest.mark.parametrize("tokenizer", [Bytes(), WithMask()])
@pytest.mark.parametrize("temperature", [0.0, 5.0])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_neither_the_mask_nor_padding_is_ever_written(tokenizer: Any, temperature: float, guidance: float) -> None:
    logits = torch.zeros(64, ROWS)
    logits[:, MASK], logits[:, 258:] = 1e6, 1e5
    for remasking in ("low-confidence", "random"):
        written = generate(
            Fixed(logits), tokenizer, [[1], [2, 3]], MASK, 32, 16, remasking=remasking, temperature=temperature,
            guidance=guidance, stop_at_eot=False,
        )  # fmt: skip
        assert all(len(ids) == 32 and max(ids) <= 256 for ids in written)


def test_logits_that_are_not_finite_are_named() -> None:
    with pytest.raises(RunError, match="logits are not finite"):
        generate(Fixed(torch.full((64, ROWS), float("nan"))), Bytes(), [[1]], MASK, 4, 4)


# --- prompts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low-confidence", "random"])
def test_a_prompt_does_not_feel_its_neighbors(model: GPT, temperature: float, guidance: float, remasking: Any) -> None:
    prompts = [[1, 2, 3], [7], [9] * 20, [8, 4], [1, 2, 3]]
    words: dict[str, Any] = {
        "max_new_tokens": 12, "steps": 6, "block_length": 6, "remasking": remasking, "temperature": temperature,
        "guidance": guidance, "seed": 3, "stop_at_eot": False,
    }  # fmt: skip
    together = generate(model, Bytes(), prompts, MASK, **words)
    assert together == [generate(model, Bytes(), [prompt], MASK, **words)[0] for prompt in prompts]
    assert together[0] == together[4] != together[1]


def test_more_prompts_than_a_batch_holds(model: GPT) -> None:
    prompts = [[index] for index in range(20)]
    seen: set[int] = set()
    written = generate(model, Bytes(), prompts, MASK, 4, 4, stop_at_eot=False, on_step=lambda index, step, ids: seen.add(index))
    assert seen == set(range(20))
    assert written[17] == generate(model, Bytes(), [[17]], MASK, 4, 4, stop_at_eot=False)[0]


def test_zero_temperature_needs_no_seed_and_others_follow_it(model: GPT) -> None:
    cold = [generate(model, Bytes(), ["ab"], MASK, 16, 8, seed=seed) for seed in (1, 2)]
    warm = [generate(model, Bytes(), ["ab"], MASK, 16, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert cold[0] == cold[1] and warm[0] == warm[1] != warm[2]


def test_one_token_a_step_is_the_greedy_order(model: GPT) -> None:
    """Against a loop over whole forwards: each step writes the likeliest token of the surest place."""
    model.eval()
    ids = torch.tensor([[5, 6, 7] + [MASK] * 8])
    with torch.no_grad():
        for _ in range(8):
            shares = model(ids)[0, :, :257].double().softmax(dim=-1)
            shares[ids[0] != MASK] = -1
            place = int(shares.amax(dim=-1).argmax())
            ids[0, place] = int(shares[place].argmax())
    assert generate(model, Bytes(), [[5, 6, 7]], MASK, 8, 8, stop_at_eot=False) == [ids[0, 3:].tolist()]


def test_a_long_prompt_keeps_its_end() -> None:
    model = sure(*[65] * 64)
    generate(model, Bytes(), [list(range(100))], MASK, 60, 1)
    assert model.shown[0][0, :4].tolist() == [96, 97, 98, 99]
    generate(model, Bytes(), [list(range(100))], MASK, 64, 1)
    assert model.shown[1].tolist() == [[MASK] * 64]


def test_text_is_cut_at_its_end() -> None:
    wanted = sure(65, 66, 256, 67, 256, prompt=1)
    assert generate(wanted, Bytes(), ["x"], MASK, 5, 5) == ["AB"]
    assert generate(wanted, Bytes(), [[1]], MASK, 5, 5, stop_at_eot=False) == [[65, 66, 256, 67, 256]]
    assert generate(sure(256, prompt=1), Bytes(), ["x"], MASK, 3, 3) == [""]
    assert generate(wanted, Bytes(), ["x"], MASK, 5, 5, stops={66, 67}) == ["A"]
    assert generate(wanted, Bytes(), [[1]], MASK, 5, 5, stop_at_eot=False, stops={67}) == [[65, 66, 256]]
    assert generate(wanted, Bytes(), [], MASK, 5, 5) == []


def test_ids_outside_the_vocabulary_and_the_mask_are_refused(model: GPT) -> None:
    with pytest.raises(DataError, match=r"prompt: token ids must be below the vocabulary size 257\. Found 300"):
        generate(model, Bytes(), [[300]], MASK, 4, 4)
    with pytest.raises(DataError, match=r"prompt: token ids must not be the mask\. Found 257"):
        generate(model, WithMask(), [[MASK]], MASK, 4, 4)
    with pytest.raises(ConfigError, match=r"mask_id: must be below the model's 320 embedding rows\. Found 320"):
        generate(model, Bytes(), [[1]], 320, 4, 4)


def test_a_model_that_only_looks_back_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: causal, cannot fill masks"):
        generate(make(family="gpt"), Bytes(), [[1]], MASK, 4, 4)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = make(dropout=0.5).train(training)
    first = generate(model, Bytes(), ["a"], MASK, 8, 4)
    assert generate(model, Bytes(), ["a"], MASK, 8, 4) == first  # dropout is off
    assert model.training == training and torch.is_grad_enabled()
