"""Other tools' words: whoever types them is told ours."""

from __future__ import annotations

FOREIGN = {
    "batch_size": "train.global_batch (sequences per update, over all ranks)",
    "per_device_train_batch_size": "train.global_batch, and --layer.microbatch.sequences for what one GPU holds at once",
    "micro_batch_size": "--layer.microbatch.sequences",
    "gradient_accumulation_steps": "train.global_batch; accumulation follows from it and the micro-batch",
    "lr": "optim.learning_rate",
    "learning_rate": "optim.learning_rate",
    "min_lr": "optim.min_learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "grad_clip": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "num_train_epochs": "train.epochs",
    "epochs": "train.epochs",
    "block_size": "data.sequence_length",
    "max_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "n_layer": "model.depth",
    "num_hidden_layers": "model.depth",
    "layers": "model.depth",
    "n_head": "model.heads",
    "num_attention_heads": "model.heads",
    "n_embd": "model.width",
    "hidden_size": "model.width",
    "model_name": "RECIPE, the first word after train; `gptoughts recipes` lists them",
    "model_type": "RECIPE, the first word after train; `gptoughts recipes` lists them",
    "file": "data.path",
    "dataset": "data.path",
    "output_dir": "--run-dir",
    "out_dir": "--run-dir",
    "fp16": "--layer.precision fp16",
    "bf16": "--layer.precision bf16",
    "use_fp8": "--profile h100-fp8, or --layer.precision fp8-te",
    "tf32": "--layer.matmul tf32",
    "gradient_checkpointing": "--layer.recompute recompute-blocks",
    "flash_attention": "--layer.attention sdpa",
    "attn_implementation": "--layer.attention",
    "torch_compile": "--layer.compile compile-blocks",
    "compile": "--layer.compile compile-blocks",
    "resume_from_checkpoint": "--resume",
    "dropout": "model.dropout",
    "eval_interval": "eval.every",
    "eval_steps": "eval.every",
    "save_steps": "save.every",
    "logging_steps": "log.every",
    "log_interval": "log.every",
    "train_batch_size": "train.global_batch (sequences per update, over all ranks)",
    "micro_batch_size_per_gpu": "--layer.microbatch.sequences",
    "device_batch_size": "--layer.microbatch.sequences",
    "total_batch_size": "train.global_batch (sequences per update, over all ranks)",
    "max_lr": "optim.learning_rate",
    "lr_scheduler": "optim.schedule",
    "warmup_ratio": "optim.warmup_steps",
    "num_epochs": "train.epochs",
    "num_steps": "train.steps",
    "max_seq_length": "data.sequence_length",
    "context_length": "data.sequence_length",
    "n_layers": "model.depth",
    "n_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "d_model": "model.width",
    "intermediate_size": "model.hidden",
    "random_seed": "seed",
    "fp8": "--profile h100-fp8, or --layer.precision fp8-te",
    "use_bf16": "--layer.precision bf16",
    "use_flash_attention": "--layer.attention sdpa",
    "activation_checkpointing": "--layer.recompute recompute-blocks",
    "use_compile": "--layer.compile compile-blocks",
    "resume_from": "--resume",
    "data_path": "data.path",
    "dataset_name": "data.path",
    "run_name": "--run",
    "num_workers": "--layer.loader.batches (batches read ahead); tokenising takes --processes",
    "optimizer": "--layer.optimizer for its implementation; optim.name for its kind",
}
"""Another tool's word -> ours for the same thing: a key of the recipe, or a flag."""

_TABLES = ("model.", "data.", "optim.", "train.", "eval.", "sample.", "save.", "log.", "seed")


def ours(word: str) -> str:
    """What `word` (with or without dashes and tables before it) is called here; empty where it is unknown."""
    return FOREIGN.get(word.lstrip("-").rpartition(".")[2].replace("-", "_"), "")


def our_flag(word: str) -> str:
    """As `ours`, spelled as a flag."""
    found = ours(word)
    key, blank, rest = found.partition(" ")
    return f"--{key.replace('_', '-')}{blank}{rest}" if key.startswith(_TABLES) else found
