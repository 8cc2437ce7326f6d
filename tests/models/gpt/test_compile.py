"""Twelve blocks share one compiled graph: Dynamo's recompile limit is eight, and a ninth block would silently stay eager."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from gptoughts.models.gpt.gpt import GPT

DEPTH = 12


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: GPT) -> torch.Tensor:
    tokens = torch.arange(32).view(2, 16)
    loss = model(tokens, tokens)
    loss.backward()
    return loss.detach()


def regions(model: GPT) -> int:
    """Count calls of compiled regions in one step's forward."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step(model)
    names = [event.name for event in trace.events()]
    return sum(name.startswith("Torch-Compiled Region") for name in names)


def test_twelve_blocks_are_one_graph(make_model: Callable[..., GPT], form: dict[str, Any]) -> None:
    model = make_model(depth=DEPTH, **form).train()
    expected = step(model)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    names = list(model.state_dict())

    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    torch.testing.assert_close(step(model), expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])

    assert counter.frame_count == 1
    assert regions(model) == DEPTH
    assert counter.frame_count == 1
    assert list(model.state_dict()) == names


def test_a_number_that_differs_by_block_would_be_seen(make_model: Callable[..., GPT]) -> None:
    model = make_model(depth=DEPTH).train()
    for index, block in enumerate(model.blocks):
        block.attention.out.index = index
        block.attention.out.forward = _with_index(block.attention.out)
    counter = CompileCounterWithBackend("eager")
    for block in model.blocks:
        block.compile(dynamic=False, backend=counter)
    step(model)
    assert counter.frame_count > 1
    assert regions(model) < DEPTH


def _with_index(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.nn.functional.linear(x, module.weight, module.bias) + 0 * module.index
