"""ZeRO by DeepSpeed's engine: its configuration, starting it, and its calls in our hooks."""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptoughts.engine.distributed.mpi_group import BACKEND
from gptoughts.engine.distributed.process_group import own_group
from gptoughts.engine.engine import Engine, Undo, allocate
from gptoughts.errors import PlanError
from gptoughts.layers.support.several_ranks import autocasts_to_bf16
from gptoughts.layers.support.zero_optimizer import ZeroOptimizer, places
from gptoughts.models.adapters.frozen import widen
from gptoughts.models.sources import shape_of
from gptoughts.models.torch_internals import parameter_table

NEVER = 2**31


@dataclass(frozen=True)
class Request:
    """Options of a ZeRO layer."""

    stage: int
    bucket_bytes: int
    offload_optimizer: bool = False
    offload_weights: bool = False


@contextmanager
def zero_engine(engine: Engine, request: Request) -> Iterator[None]:
    """Train with DeepSpeed's engine inside the block. For stage 3, partition the model, which is on meta, at once.

    DeepSpeed starts when the optimizer is attached. The weights of stage 3 stay partitioned afterwards. Raises PlanError for stage 3
    over MPI.
    """
    if request.stage == 3 and dist.is_initialized() and dist.get_backend() == BACKEND:
        raise PlanError("zero3: deadlocks over --collectives mpi", fix="--layer.parallel fsdp2, or without --collectives mpi")
    deepspeed = _deepspeed(engine)
    with ExitStack() as stack:
        stack.enter_context(own_group(engine.device))
        stack.enter_context(_local_rank(engine))
        widen(engine.bare)  # DeepSpeed takes one dtype for all weights
        config = configuration(engine, request)
        if request.stage == 3:
            _partition(deepspeed, engine, config)

        def started(attach: Any, made: torch.optim.Optimizer) -> None:
            runner, optimizer = _start(deepspeed, engine, made, config, request.stage)
            stack.callback(runner.stop)
            attach(optimizer)

        stack.callback(engine.wrap("attach", started))
        yield


def _deepspeed(engine: Engine) -> Any:
    """Import DeepSpeed for the engine's device, with its log limited to errors."""
    os.environ.setdefault("DS_ACCELERATOR", engine.device.type)  # read on import; otherwise any GPU that it finds
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Collectives for inference on CPUs, which it would compile for a minute on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings(
        "ignore", message=r".*(all_gather_into|reduce_scatter)_tensor` is deprecated", category=FutureWarning
    )
    return deepspeed


@contextmanager
def _local_rank(engine: Engine) -> Iterator[None]:
    """Set LOCAL_RANK for the block: DeepSpeed reads it at start and in forwards, and of all launchers only torchrun sets it."""
    before = os.environ.get("LOCAL_RANK")
    index = engine.device.index if engine.device.type == "cuda" else engine.ranks.world.local_rank
    os.environ["LOCAL_RANK"] = str(index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def configuration(engine: Engine, request: Request) -> dict[str, Any]:
    """Return DeepSpeed's configuration. Losses are weighted and accumulated by the engine, so DeepSpeed counts one micro-batch."""
    on_gpu, trained = engine.device.type == "cuda", sum(shape_of(one).numel() for one in engine.parameters())
    elements = min(request.bucket_bytes // 4, trained)
    zero: dict[str, Any] = {
        "stage": request.stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements + elements % 2,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for the whole process
    }
    host = {"device": "cpu", "pin_memory": on_gpu}
    if request.offload_optimizer:
        zero["offload_optimizer"] = host
    if request.offload_weights:
        zero["offload_param"] = host
    if request.stage == 3:
        block = max((sum(shape_of(one).numel() for one in block.parameters()) for block in engine.blocks.values()), default=0)
        zero |= {
            "stage3_max_live_parameters": 2 * block,
            "stage3_max_reuse_distance": 2 * block,
            "stage3_prefetch_bucket_size": block,
        }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max(0.0, engine.recipe.optim.clip_norm),
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer slot's own one, also on the CPU
        "zero_optimization": zero,
    }
    if autocasts_to_bf16(engine):
        # Without this, DeepSpeed disables an autocast around its forward. It gathers modules of this list, and reduces their gradients,
        # in bfloat16.
        listed = ["torch.nn.Linear"] if request.stage == 3 else []
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": listed}
    return config


def _partition(deepspeed: Any, engine: Engine, config: Mapping[str, Any]) -> None:
    """Allocate and partition the parameters of one module at a time, so that no rank holds all of them. Values come later."""
    users: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for module in engine.bare.modules():
        for name, parameter in parameter_table(module).items():
            users[id(parameter)].append((parameter_table(module), name))
    for module in engine.bare.modules():
        holder, before = nn.Module(), dict(parameter_table(module))
        for name, parameter in before.items():
            holder.register_parameter(name, parameter)
        allocate(holder, engine.device)
        for name, parameter in before.items():
            for table, place in users.get(id(parameter), ()):
                table[place] = getattr(holder, name)
        if before:
            deepspeed.zero.Init(module=holder, config_dict_or_path=dict(config))


@dataclass
class _Runner:
    """DeepSpeed's engine in the hooks of ours."""

    engine: Engine
    started: Any
    model: nn.Module
    """`engine.model` before."""
    undo: list[Undo] = field(default_factory=list)
    updated: bool = False

    def stop(self) -> None:
        """Take DeepSpeed out of the hooks and end its engine."""
        for undo in reversed(self.undo):
            undo()
        self.engine.model = self.model
        self.started.module_forward_pre_hook.remove()
        self.started.module_forward_post_hook.remove()
        self.started.destroy()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`; ranks exchange it now (stages 2 and 3) or in the last micro-batch (stage 1)."""
        self.started.backward(loss, scale_wrt_gas=False)

    def update(self, optimizer: ZeroOptimizer) -> Tensor:
        """Clip and update, which DeepSpeed does in one call. Returns the norm before clipping."""
        optimizer.give_settings()
        self.started.step()
        optimizer.take_results()
        self.updated = self.started.was_step_applied()
        self.engine.counters.call_counts["zero"] += 1
        norm = self.started.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device).reshape(())


def _start(
    deepspeed: Any, engine: Engine, made: torch.optim.Optimizer, config: Mapping[str, Any], stage: int
) -> tuple[_Runner, ZeroOptimizer]:
    """Start DeepSpeed's engine over the model and `made`, and route the engine's hooks to it."""
    groups = [{**group, "params": list(group["params"])} for group in made.param_groups]
    inner = list(made.param_groups)  # DeepSpeed replaces their parameters by its partitions
    before, repeatable = engine.model, engine.repeatable
    started, *_ = deepspeed.initialize(model=engine.bare, optimizer=made, config=dict(config), dist_init_required=False)
    optimizer = ZeroOptimizer(groups, inner, made, places(started.optimizer, groups, stage))
    runner = _Runner(engine, started, before)

    @contextmanager
    def boundary(last: bool) -> Iterator[None]:
        started.set_gradient_accumulation_boundary(last)
        yield

    engine.model = started
    engine.repeatable = False  # a failed backward leaves reduced gradients behind
    runner.undo = [
        lambda: setattr(engine, "repeatable", repeatable),
        engine.wrap_context("grad_sync", boundary),
        engine.replace("backward", runner.backward),
        engine.replace("clip", lambda: runner.update(optimizer)),
        engine.replace("step", lambda: runner.updated),
    ]
    return runner, optimizer
