"""Hugging Face's Trainer on a job's model, as a child that takes turns: bf16, SDPA, torch.compile and fused AdamW, as its guide says.

The same config.json, the same text, the same tokens per update and per forward. It is given what its documentation recommends for one
GPU; nothing that it does by itself is switched off, but for checkpoints and reports.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.device.serving import Channel, served, settle, timed
from tests.device.text import windows

WARM = 4
ENDLESS = 1_000_000


class Windows(Dataset[dict[str, Tensor]]):
    """The batches of our own children, one row at a time; labels are the ids, which transformers shifts."""

    def __init__(self, rows: int, length: int, count: int) -> None:
        stream = windows(rows, length, count)
        self._rows = [torch.from_numpy(row.astype("int64")) for _ in range(8) for row in next(stream)]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index % len(self._rows)]
        return {"input_ids": row, "labels": row}


def turns(job: dict[str, Any], channel: Channel, device_type: str, ready: dict[str, Any]) -> Any:
    """A callback that holds the Trainer before the first step of each turn until the parent has asked for it."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.left, self.steps = WARM, 0
            self.taken: _Clock | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if self.left:
                return
            if state.global_step == WARM:
                settle(device_type)
                channel.say({"ready": ready})
                if device_type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            self.steps = self.left = channel.heard()
            if not self.left:
                control.should_training_stop = True
                return
            settle(device_type)
            self.taken = _Clock(self.steps, device_type)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if not self.steps and state.global_step >= WARM + 1:
                control.should_training_stop = True
                return
            self.left -= 1
            if self.left == 0 and self.taken is not None:
                channel.say({"done": self.taken.stop()})

    return Turns()


class _Clock:
    """Times a turn whose steps somebody else makes."""

    def __init__(self, steps: int, device_type: str) -> None:
        from time import perf_counter

        self._now, self._steps, self._device_type = perf_counter, steps, device_type
        self._began = perf_counter()

    def stop(self) -> dict[str, Any]:
        """Seconds since then, with the device done."""
        settle(self._device_type)
        seconds = self._now() - self._began
        return {**timed(0, self._device_type, lambda _: None), "steps": self._steps, "seconds": seconds}


def model_of(job: dict[str, Any], device: torch.device) -> Any:
    """The model of the job's config.json with random float32 weights, drawn on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    held = json.loads(Path(job["fields"]["model.config"]).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**held)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    return model


def arguments(job: dict[str, Any], on_gpu: bool, folder: str) -> dict[str, Any]:
    """What the Trainer is told."""
    batch, most = int(job["fields"]["train.global_batch"]), int(job["sequences"])
    return {
        "output_dir": folder, "per_device_train_batch_size": most, "gradient_accumulation_steps": batch // most,
        "max_steps": ENDLESS, "bf16": True, "torch_compile": job["compiled"], "optim": "adamw_torch_fused",
        "learning_rate": 4e-4, "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0, "lr_scheduler_type": "constant",
        "logging_steps": 10, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0, "use_cpu": not on_gpu,
        "dataloader_num_workers": 2 if on_gpu else 0, "dataloader_persistent_workers": on_gpu, "dataloader_drop_last": True,
        **({"tf32": True} if on_gpu else {}),
    }  # fmt: skip


def body(job: dict[str, Any], channel: Channel) -> None:
    """Train until told to stop; at the end say what it came to."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from transformers import Trainer, TrainingArguments

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    model = model_of(job, device)
    length = int(job["fields"]["data.sequence_length"])
    told = arguments(job, on_gpu, tempfile.mkdtemp(prefix="hf-trainer-"))
    ready = {
        "plan": {key: value for key, value in told.items() if key != "output_dir"},
        "model": {"parameters": sum(parameter.numel() for parameter in model.parameters())},
        "tokens_per_step": told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] * length,
        "micro_batch": told["per_device_train_batch_size"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation,
    }
    data = Windows(model.config.vocab_size, length, int(job["fields"]["train.global_batch"]))
    callback = turns(job, channel, device.type, ready)
    trainer = Trainer(model=model, args=TrainingArguments(**told), train_dataset=data, callbacks=[callback])
    trainer.train()
    losses = [round(float(row["loss"]), 5) for row in trainer.state.log_history if "loss" in row]
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    channel.say({"ended": {"peak_memory_bytes": peak, "losses": losses, "updates": trainer.state.global_step}})


if __name__ == "__main__":
    sys.exit(served(body))
