"""Every optimizer against its paper in a few lines, on a model that learns, across a restart to the last bit, and on two ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from gptoughts.config.recipe import OPTIMIZER_KEYS, SELECTIVE_KEYS, OptimConfig, optim_problems
from gptoughts.engine.checkpoint import integrity
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import NextToken
from gptoughts.engine.optim.apollo import Apollo
from gptoughts.engine.optim.factory import averaged, covered, hidden_matrices, optimizer
from gptoughts.engine.optim.lr_schedule import set_rate
from gptoughts.engine.optim.param_groups import GROUP_STATE
from gptoughts.errors import CheckpointError, ConfigError, PlanError
from gptoughts.hardware.world import World
from gptoughts.inference.eval.perplexity import mean_loss
from gptoughts.layers import CATALOG
from gptoughts.models.family import FAMILIES, custom_family
from gptoughts.models.sources import meta_model
from gptoughts.planning.layer import Status
from gptoughts.run.build import build_engine
from tests.engine.test_ddp import launch
from tests.support.engines import ROWS, engine_of, plan_of, random_batches, recipe_of, steps, watched
from tests.support.optimizer_worker import NAMES, optim_of, reached

RATE, DECAY, STEPS = 0.01, 0.1, 6


def config_of(name: str, **more: Any) -> OptimConfig:
    return OptimConfig(**optim_of(name, **{"learning_rate": RATE, "weight_decay": DECAY, **more}))


class Net(nn.Module):
    """Two blocks between an embedding and a head that may share its weight; a block also has a bias, an embedding and experts."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 10), "near": nn.Embedding(3, 6)}) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(2, 3, 4))
        for block in self.blocks:
            block.register_parameter("experts", nn.Parameter(torch.randn(2, 6, 5)))
        self.head = nn.Linear(6, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def net() -> Net:
    torch.manual_seed(3)
    return Net().double()


def gradients(model: nn.Module, count: int = STEPS) -> list[dict[str, Tensor]]:
    """Random ones, of about 1; those of `experts` are so small that epsilon counts."""
    generator, sizes = torch.Generator().manual_seed(5), {"experts": 1e-8}
    return [
        {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * sizes.get(name, 1.0)
            for name, p in model.named_parameters()
        }
        for _ in range(count)
    ]


def trace(
    name: str, watch: Callable[[Any, nn.Module], Any] = lambda made, model: None, **more: Any
) -> tuple[nn.Module, list[Any]]:
    """The model after STEPS updates with given gradients, and what `watch` saw after each."""
    model, seen = net(), []
    made = optimizer(model, config_of(name, **more), "plain", model.blocks, seed=11, updates=STEPS)
    for given_gradients in gradients(model):
        for key, parameter in model.named_parameters():
            parameter.grad = given_gradients[key].clone()
        set_rate(made, RATE)
        made.step()
        seen.append(watch(made, model))
    return model, seen


def decay_of(weight: Tensor) -> float:
    return DECAY if weight.dim() >= 2 else 0.0


# --- the update, from the paper


def adamw_reference(weight: Tensor, given: list[Tensor], beta1: float = 0.9, beta2: float = 0.95) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(given, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        weight = weight - RATE * step - RATE * decay_of(weight) * weight
    return weight


def lion_reference(weight: Tensor, given: list[Tensor]) -> Tensor:
    """Chen et al. 2023, algorithm 2."""
    m = torch.zeros_like(weight)
    for g in given:
        weight = weight - RATE * ((0.9 * m + 0.1 * g).sign() + decay_of(weight) * weight)
        m = 0.95 * m + 0.05 * g
    return weight


def ademamix_reference(weight: Tensor, given: list[Tensor]) -> Tensor:
    """Pagliardini et al. 2024, algorithm 1 and the schedules of section 3: alpha rises linearly, beta3 by its half-life."""
    m1, m2, v = (torch.zeros_like(weight) for _ in range(3))
    alpha, beta1, beta2, beta3, length = 5.0, 0.9, 0.95, 0.9999, len(given)
    for t, g in enumerate(given, 1):
        low, high = math.log(beta1), math.log(beta3)
        slow = min(math.exp(low * high / ((1 - t / length) * high + t / length * low)), beta3)
        m1, m2, v = beta1 * m1 + (1 - beta1) * g, slow * m2 + (1 - slow) * g, beta2 * v + (1 - beta2) * g * g
        step = (m1 / (1 - beta1**t) + min(alpha * t / length, alpha) * m2) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        weight = weight - RATE * (step + decay_of(weight) * weight)
    return weight


def schedule_free_reference(weight: Tensor, given: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Defazio et al. 2024, algorithm 1: what is trained (y) and what stands for the model (x)."""
    x = y = z = weight
    v, weights = torch.zeros_like(weight), 0.0
    for t, g in enumerate(given, 1):
        v = 0.95 * v + 0.05 * g * g
        z = z - RATE * (g / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + decay_of(weight) * y)
        weights += RATE**2
        x = x + RATE**2 / weights * (z - x)
        y = 0.1 * z + 0.9 * x
    return y, x


def apollo_reference(weight: Tensor, given: list[Tensor], projections: list[Tensor], per_channel: bool, scale: float) -> Tensor:
    """Zhu et al. 2024, algorithm 1, for a weight whose channels are its rows (10 x 6): P has one row per column."""
    m = v = torch.zeros(())
    before = None
    for t, (g, projection) in enumerate(zip(given, projections, strict=True), 1):
        low = g @ projection
        m, v = 0.9 * m + 0.1 * low, 0.95 * v + 0.05 * low * low
        adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        if per_channel:
            update = torch.stack([row * (adam[i].norm() / low[i].norm()) for i, row in enumerate(g)])
        else:
            update = g * (adam.norm() / low.norm())
        length = float(update.norm())
        if before is not None and length > 1.01 * before:
            update = update * (1.01 * before / length)
        before = float(update.norm())
        weight = weight - RATE * (math.sqrt(scale) * update + DECAY * weight)
    return weight


def given_to(name: str) -> list[Tensor]:
    return [of_step[name] for of_step in gradients(net())]


@pytest.mark.parametrize(
    ("name", "reference"), [("adamw", adamw_reference), ("lion", lion_reference), ("ademamix", ademamix_reference)]
)
def test_every_weight_moves_as_the_paper_says(name: str, reference: Callable[..., Tensor]) -> None:
    model, _ = trace(name)
    for key, start in net().named_parameters():
        torch.testing.assert_close(
            model.get_parameter(key).detach(), reference(start.detach(), given_to(key)), rtol=1e-9, atol=1e-12
        )


def test_schedule_free_trains_y_and_evaluates_x_as_the_paper_says() -> None:
    def seen(made: Any, model: nn.Module) -> dict[str, Tensor]:
        with averaged(made):
            return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    model, shown = trace("schedule-free", seen)
    for key, start in net().named_parameters():
        y, x = schedule_free_reference(start.detach(), given_to(key))
        torch.testing.assert_close(model.get_parameter(key).detach(), y, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shown[-1][key], x, rtol=1e-9, atol=1e-12)
    assert (shown[-1]["head.weight"] - model.head.weight).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "rank", "scale"), [("apollo", 4, 1.0), ("apollo-mini", 1, 128.0)])
def test_apollo_scales_the_raw_gradient_as_the_paper_says(name: str, rank: int, scale: float) -> None:
    key = "blocks.1.up.weight"

    def seen(made: Any, model: nn.Module) -> Tensor:
        return made.state[model.get_parameter(key)]["projection"].clone()

    model, projections = trace(name, seen, **({"rank": 4} if name == "apollo" else {}))
    assert [tuple(projection.shape) for projection in projections] == [(6, rank)] * STEPS
    renewed = [index for index in range(1, STEPS) if not torch.equal(projections[index], projections[index - 1])]
    assert renewed == [3]
    expected = apollo_reference(net().get_parameter(key).detach(), given_to(key), projections, name == "apollo", scale)
    torch.testing.assert_close(model.get_parameter(key).detach(), expected, rtol=1e-6, atol=1e-9)
    for other in ("embed.weight", "head.weight", "blocks.0.near.weight", "blocks.0.experts", "blocks.0.up.bias"):
        start = net().get_parameter(other).detach()
        torch.testing.assert_close(
            model.get_parameter(other).detach(), adamw_reference(start, given_to(other)), rtol=1e-9, atol=1e-12
        )


def test_muon_moves_matrices_along_the_nearest_orthogonal_one_and_the_rest_by_adamw() -> None:
    model = net().float()
    made = optimizer(model, config_of("muon"), "plain", model.blocks)
    weight = model.blocks[0]["up"].weight
    before, gradient = weight.detach().clone(), torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weight.grad = gradient.clone()
    made.step()
    moved = (before * (1 - RATE * DECAY) - weight.detach()) / (RATE * 0.2 * math.sqrt(10))
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.6 and values.max() < 1.3, values
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((left @ right).flatten(), moved.flatten(), dim=0) > 0.97
    model, _ = trace("muon")
    for other in ("embed.weight", "head.weight", "blocks.0.near.weight", "blocks.0.experts", "blocks.0.up.bias", "experts"):
        start = net().get_parameter(other).detach()
        torch.testing.assert_close(
            model.get_parameter(other).detach(), adamw_reference(start, given_to(other)), rtol=1e-9, atol=1e-12
        )


def test_muons_update_is_as_large_as_adamws() -> None:
    """One learning rate for both, because the root mean square of the first update is alike at any shape."""
    for rows, columns in ((64, 64), (64, 256), (256, 64)):
        block = nn.ModuleList([nn.Linear(columns, rows, bias=False)])
        made = optimizer(block, config_of("muon", weight_decay=0.0), "plain", block)
        before = block[0].weight.detach().clone()
        block[0].weight.grad = torch.randn(rows, columns)
        made.step()
        size = (block[0].weight.detach() - before).square().mean().sqrt() / RATE
        assert 0.1 < size < 0.3


# --- which parameter goes where


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(name: str, tied: bool) -> None:
    model = Net(tied)
    model.blocks[0]["up"].bias.requires_grad_(False)
    model.embed.weight.requires_grad_(False)
    made = optimizer(model, config_of(name), "plain", model.blocks, updates=9)
    inside = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    assert sorted(inside) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    for group in made.param_groups:
        assert {decay_of(parameter) for parameter in group["params"]} == {group["weight_decay"]}
    set_rate(made, 0.125)
    assert {group["lr"] for group in made.param_groups} == {0.125}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["modern", "gpt2"])
def test_hidden_matrices_of_the_native_model_are_its_projections(family: str, tied: bool) -> None:
    recipe = recipe_of(family)
    model = FAMILIES["gpt"].build(recipe.model.model_copy(update={"tied": tied}), ROWS, 32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in hidden_matrices(model, FAMILIES["gpt"].blocks(model).values(), "muon")}
    expected = {name for name, parameter in model.named_parameters() if name.startswith("blocks.") and parameter.dim() == 2}
    assert found == expected
    assert len(found) == 4 * 3


def test_hidden_matrices_of_pretrained_and_adapted_models() -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    for tied in (True, False):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied))
        found = hidden_matrices(model, custom_family(model).blocks(model).values(), "muon")
        assert len(found) == 2 * 7
        held = {id(parameter) for parameter in found}
        assert id(model.get_input_embeddings().weight) not in held
        assert id(model.get_output_embeddings().weight) not in held
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    blocks = custom_family(adapted).blocks(adapted).values()
    assert len(hidden_matrices(adapted, blocks, "muon")) == 2 * 7 * 2
    made = optimizer(adapted, config_of("muon"), "plain", blocks)
    given = [parameter for group in made.param_groups for parameter in group["params"]]
    assert len(given) == 2 * 7 * 2
    assert all(parameter.requires_grad for parameter in given)


@pytest.mark.parametrize("name", ["muon", "apollo", "apollo-mini"])
def test_a_model_without_hidden_matrices_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim.name: {name} needs trained matrices inside .*\n.*--optim.name adamw"):
        optimizer(nn.Linear(3, 3), config_of(name), "plain")


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_half_precision_are_refused(name: str) -> None:
    model = Net()
    model.blocks[1]["up"].weight.data = model.blocks[1]["up"].weight.data.bfloat16()
    with pytest.raises(ConfigError, match=r"blocks.1.up.weight: 1 of \d+ trained parameters are not float32, .*Found bfloat16"):
        optimizer(model, config_of(name), "plain", model.blocks, updates=9)
    model.blocks[1]["up"].weight.requires_grad_(False)
    optimizer(model, config_of(name), "plain", model.blocks, updates=9)


@pytest.mark.parametrize(
    ("name", "package"), [("lion", "pytorch-optimizer"), ("ademamix", "pytorch-optimizer"), ("schedule-free", "schedulefree")]
)
def test_a_missing_package_names_the_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    said = rf"optim.name: {name} needs the package {package}.*\n.*pip install 'gptoughts\[opt"
    with pytest.raises(ConfigError, match=said):
        optimizer(Net(), config_of(name), "plain", updates=9)


# --- apollo's draws


def test_apollo_touches_no_generator_and_draws_by_seed_name_and_renewal() -> None:
    def projections(seed: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        weights = {name: nn.Parameter(torch.ones(5, 7)) for name in names}
        made = Apollo(
            weights, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, rank=3, scale=1.0, per="channel", gap=1, seed=seed
        )
        for _ in range(2):
            for weight in weights.values():
                weight.grad = torch.ones(5, 7)
            made.step()
        return {name: made.state[weight]["projection"] for name, weight in weights.items()}

    before = torch.get_rng_state()
    alone, among = projections(1, ("b",)), projections(1, ("a", "b"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(alone["b"], among["b"])
    assert not torch.equal(among["a"], among["b"])
    assert not torch.equal(projections(2, ("b",))["b"], alone["b"])


def test_apollos_projection_keeps_lengths_on_average() -> None:
    weight = nn.Parameter(torch.zeros(400, 64))
    made = Apollo(
        {"w": weight}, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, rank=32, scale=1.0, per="channel", gap=1, seed=0
    )
    gradient = torch.randn(400, 64)
    weight.grad = gradient.clone()
    made.step()
    low = gradient @ made.state[weight]["projection"]
    assert float((low.norm(dim=1) / gradient.norm(dim=1)).square().mean()) == pytest.approx(1.0, abs=0.15)


def test_apollo_goes_on_after_a_gradient_of_zero() -> None:
    """An adapter's first gradient is zero; its update must not have to grow from nothing by a hundredth a step."""
    weight = nn.Parameter(torch.ones(5, 7))
    made = Apollo(
        {"w": weight}, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, rank=3, scale=1.0, per="channel", gap=200, seed=0
    )
    for gradient in (torch.zeros(5, 7), torch.ones(5, 7)):
        weight.grad = gradient
        made.step()
    assert torch.isfinite(weight).all()
    assert (weight - 1).abs().min() > 0.1 * RATE


# --- in the engine


@contextmanager
def engine_from(recipe: Any, source: Any, batches: Iterator[Any], layer: str = "plain") -> Iterator[Engine]:
    family = FAMILIES[recipe.model.family]
    plan, ranks = plan_of(recipe, {"optimizer": layer}), Ranks(World(), torch.device("cpu"))
    with build_engine(
        meta_model(recipe, family, ROWS),
        family,
        NextToken(),
        recipe,
        plan,
        CATALOG,
        ranks=ranks,
        batches=batches,
        source=source,
    ) as engine:
        yield engine


def recipe_with(name: str, **more: Any) -> Any:
    return recipe_of("modern", optim=optim_of(name, **more))


def whole_state(engine: Engine) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in engine.bare.named_parameters()}
    assert engine.optimizer is not None
    state = {f"{names[id(p)]}/{key}": value for p, values in engine.optimizer.state.items() for key, value in values.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]
    return {**{name: p.detach().clone() for name, p in engine.bare.named_parameters()}, **state, "groups": groups}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key
            assert (value.dtype, value.device) == (other[key].dtype, other[key].device), key
        else:
            assert value == other[key], key


def take(engine: Engine, step: int, folder: Path, **more: Any) -> Path:
    return checkpoint.write(training_state.snapshot(engine, step, {}, {}, {}, **more), folder)


def skipped(recipe: Any, count: int) -> Iterator[Any]:
    stream = random_batches(recipe)
    for _ in range(count):
        next(stream)
    return stream


RESUMED = [*((name, "plain") for name in NAMES), ("adamw", "fused")]


@pytest.mark.parametrize(("name", "layer"), RESUMED)
def test_a_restart_changes_no_bit(name: str, layer: str, tmp_path: Path) -> None:
    """5 + 4 updates in one go, with a validation and a checkpoint between them or without, or in two processes' worth of engines."""
    recipe = recipe_with(name)
    with engine_of(recipe, plan_of(recipe, {"optimizer": layer})) as engine:
        losses = steps(engine, 9)
        whole = whole_state(engine)
    with engine_of(recipe, plan_of(recipe, {"optimizer": layer})) as engine:
        first = steps(engine, 5)
        mean_loss(engine, [next(random_batches(recipe, seed=9))[0]])
        folder = take(engine, 5, tmp_path)
        assert first + steps(engine, 4) == losses
        same(whole_state(engine), whole)
    assert integrity.damage(folder) == ""
    with engine_from(recipe, training_state.Weights(folder), skipped(recipe, 5), layer) as engine:
        training_state.restore(engine, folder)
        assert steps(engine, 4) == losses[5:]
        same(whole_state(engine), whole)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_is_proven_and_keeps_known_things_in_its_groups(name: str) -> None:
    recipe = recipe_with(name, clip_norm=0.5)
    batch = next(random_batches(recipe))
    norms: list[float] = []

    def note(step: Callable[[], bool]) -> bool:
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in engine.parameters() if p.grad is not None)))
        return step()

    with engine_of(recipe, plan_of(recipe), iter(lambda: batch, None)) as engine:
        engine.wrap("step", note)
        before = [dict(group) for group in engine.optimizer.param_groups]
        losses = steps(engine, 25)
        assert losses[-1] < 0.9 * losses[0], losses
        assert max(norms) == pytest.approx(0.5, rel=1e-3), "an update saw a gradient before it was clipped"
        changed = {
            key
            for old, new in zip(before, engine.optimizer.param_groups, strict=True)
            for key in new
            if key != "params" and old.get(key) != new[key]
        }
        assert changed <= {*GROUP_STATE, "lr"}
        if name in ("adamw", "muon", "lion"):  # the profiler takes its time
            proof = CATALOG["plain"].verify(engine, watched(engine, 0), {})
            assert proof.status is Status.ACTIVE, proof.text
            assert f"{name}: state of " in proof.text
        assert covered(engine.optimizer) == (len(engine.parameters()),) * 2
        assert all(engine.optimizer.state[parameter] for parameter in engine.parameters())


def test_the_plain_proof_says_no_where_nothing_moved_or_a_fused_update_ran() -> None:
    recipe = recipe_with("adamw")
    with engine_of(recipe, plan_of(recipe, {"optimizer": "fused"})) as engine:
        assert CATALOG["plain"].verify(engine, watched(engine), {}).status is Status.INACTIVE
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.replace("step", lambda: True)
        assert CATALOG["plain"].verify(engine, watched(engine), {}).status is Status.INACTIVE


def test_schedule_free_shows_and_saves_the_average(tmp_path: Path) -> None:
    recipe = recipe_with("schedule-free")
    held = [next(random_batches(recipe, seed=9))[0]]
    with engine_of(recipe, plan_of(recipe)) as engine:
        mean_loss(engine, held)  # before the first update
        steps(engine, 6)
        trained = {name: parameter.detach().clone() for name, parameter in engine.bare.named_parameters()}
        with engine.eval_context(), engine.eval_context():
            shown = {name: parameter.detach().clone() for name, parameter in engine.bare.named_parameters()}
        shown_loss = mean_loss(engine, held)[0]
        folder = take(engine, 6, tmp_path)
        after = dict(engine.bare.named_parameters())
        assert all(torch.equal(value, after[name]) for name, value in trained.items())
        assert "trained" not in {key for values in engine.optimizer.state.values() for key in values}
    saved = load_file(folder / "model.safetensors")
    assert any(not torch.equal(value, trained[name]) for name, value in shown.items())
    left = dict(engine.bare.named_parameters())
    for name, value in shown.items():
        assert torch.equal(saved[name], value), name
        assert torch.equal(left[name], value), name
    with engine_from(recipe, training_state.Weights(folder), skipped(recipe, 6)) as engine:  # as who only reads
        engine.optimizer = None
        with torch.no_grad():
            loss = float(engine.objective(engine.bare, held[0]) / engine.objective.weight(held[0]))
        assert loss == pytest.approx(shown_loss, rel=1e-6)


def test_a_checkpoint_of_the_trained_weights_alone(tmp_path: Path) -> None:
    recipe = recipe_with("adamw")

    def freeze(engine: Engine) -> None:
        for name, parameter in engine.bare.named_parameters():
            parameter.requires_grad_(".mlp." in name)

    class Over:
        """What was trained over what was there before."""

        def __init__(self, folder: Path, base: dict[str, Tensor]) -> None:
            self.top, self.base = training_state.Weights(folder), base

        def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
            value = self.top.tensor(name, shape)
            return self.base[name] if value is None else value

        def buffer(self, name: str) -> Tensor | None:
            return self.top.buffer(name)

        def unused(self) -> list[str]:
            return self.top.unused()

    with engine_of(recipe, plan_of(recipe)) as engine:
        base = {name: parameter.detach().clone() for name, parameter in engine.bare.named_parameters()}
        freeze(engine)
        engine.optimizer = optimizer(engine.bare, recipe.optim, "plain")
        steps(engine, 2)
        folder = take(engine, 2, tmp_path, weights="trained")
        everything = take(engine, 3, tmp_path)
        losses = steps(engine, 2)
    assert set(load_file(folder / "model.safetensors")) == {name for name in base if ".mlp." in name}
    assert set(load_file(everything / "model.safetensors")) == set(base)
    assert json.loads((folder / "state.json").read_text())["weights"] == "trained"
    with engine_from(recipe, Over(folder, base), skipped(recipe, 2)) as engine:
        freeze(engine)
        engine.optimizer = optimizer(engine.bare, recipe.optim, "plain")
        training_state.restore(engine, folder)
        assert steps(engine, 2) == losses


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ({"name": "lion"}, {"name": "adamw"}, r"name: lion \| adamw\n  class: Lion \| AdamW"),
        ({"name": "muon"}, {"name": "apollo"}, r"name: muon \| apollo"),
        ({"name": "apollo"}, {"name": "apollo", "rank": 4}, r"rank: 8 \| 4"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(was: Any, now: Any, said: str, tmp_path: Path) -> None:
    recipe, other = (recipe_of("modern", optim={**optim_of(words["name"]), **words}) for words in (was, now))
    with engine_of(recipe, plan_of(recipe)) as engine:
        steps(engine, 1)
        folder = take(engine, 1, tmp_path)
    with (
        engine_from(other, training_state.Weights(folder), random_batches(other)) as engine,
        pytest.raises(CheckpointError, match=rf"another optimizer \(checkpoint \| now\)\n  {said}(.|\n)*--name NAME"),
    ):
        training_state.restore(engine, folder)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw"])
def test_fused_is_for_adamw(name: str) -> None:
    recipe = recipe_with(name)
    with pytest.raises(PlanError, match=f"torch fuses AdamW only, optim.name is {name}"):
        plan_of(recipe, {"optimizer": "fused"})
    with pytest.raises(ConfigError, match=f"optim.name: torch fuses AdamW only. Found {name}"):
        optimizer(Net(), recipe.optim, "fused")


def test_ademamix_must_know_how_long_the_run_is() -> None:
    recipe = recipe_of("modern", optim=optim_of("ademamix"), train={"epochs": 2.0, "global_batch": 4})
    with pytest.raises(PlanError, match="needs its length in updates"):
        plan_of(recipe)
    with pytest.raises(ConfigError, match="needs its length in updates"):
        optimizer(Net(), recipe.optim, "plain")


# --- the rules of [optim]


@given(st.sampled_from(NAMES), st.sets(st.sampled_from(SELECTIVE_KEYS), max_size=4))
@settings(max_examples=60)
def test_a_key_that_nobody_would_hear_is_named(name: str, keys: set[str]) -> None:
    other = {"rank": 7, "projection_gap": 7}
    values = {**optim_of(name), "name": name} | {key: other.get(key, 0.5) for key in keys}
    for key in ("rank", "projection_gap"):
        if key not in keys:
            values.pop(key, None)
    config = OptimConfig.model_construct(**values)
    unheard = keys - set(OPTIMIZER_KEYS[name])
    found = list(optim_problems(config))
    assert {key for problem in found for key in problem.keys} == ({"name", *unheard} if unheard else set())
    assert all(name in str(problem) and key in str(problem) for problem in found for key in problem.keys if key != "name")


def test_every_optimizer_has_its_rules() -> None:
    assert set(OPTIMIZER_KEYS) == set(NAMES)
    for name in NAMES:
        assert list(optim_problems(OptimConfig(**optim_of(name)))) == []
    for schedule in ("cosine", "linear", "wsd"):
        problem = next(optim_problems(OptimConfig.model_construct(name="schedule-free", schedule=schedule)))
        assert 'Try: schedule = "constant"' in str(problem)
        assert problem.keys == ("name", "schedule")
    assert next(optim_problems(OptimConfig.model_construct(name="ademamix", beta3=0.0))).keys == ("name", "beta3")
    zero = OptimConfig.model_construct(name="schedule-free", schedule="constant", beta1=0.0)
    assert next(optim_problems(zero)).keys == ("name", "beta1")


# --- two ranks


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    """The same weights on both to the last bit, though their generators differ, and those of one process but for rounding."""
    ran = launch(2, "-m", "tests.support.optimizer_worker", str(tmp_path / "rank"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for key, weight in first.items():
        assert torch.equal(weight, second[key]), key
    for name in NAMES:
        alone = reached(name, Ranks(World(), torch.device("cpu")))
        apart = torch.cat([(weight - first[key]).abs().flatten() for key, weight in alone.items()])
        # Where a gradient is all but zero its sign, and so a whole step of 1e-3, hangs on the order of a sum.
        assert float((apart > 1e-5).float().mean()) < 1e-2, (name, float(apart.max()))
        assert float(apart.max()) < 5e-3, (name, float(apart.max()))
