"""A GGUF file as a Hugging Face folder: `python -m gptoughts.models.hf.gguf SRC DST`. Quantized weights become float32.

Run once per file, in a process of its own, by `hub.folder_of`. What is in the file is the truth: config, tokenizer and weights.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from gptoughts.errors import CheckpointError, GptoughtsError


def convert(gguf: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of `gguf` into `folder`. Raises CheckpointError."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gguf as _reader  # noqa: F401  # transformers reads the file through it
    except ImportError:
        raise CheckpointError("reading a .gguf file needs the package gguf; pip install gguf") from None
    import transformers

    try:
        words = {"gguf_file": gguf.name, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **words)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **words)
    except Exception as error:  # a foreign file in a foreign reader: struct.error, IndexError, whatever else it meets
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{gguf}: {said[:300]}") from error
    config = model.config
    # The weights are full ones now; with this key nobody could save or train them.
    config.__dict__.pop("quantization_config", None)
    setattr(model, "hf_quantizer", None)  # noqa: B010  # transformers' own slot, which its types do not tell
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check(folder, gguf)


def _check(folder: Path, gguf: Path) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in content or not (folder / "tokenizer.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{gguf}: could not be converted to a folder that can be trained")


def main(words: list[str]) -> int:
    """The program: SRC and DST. One line on stderr where it fails."""
    if len(words) != 2:
        print("usage: python -m gptoughts.models.hf.gguf SRC.gguf DST", file=sys.stderr)
        return 2
    try:
        convert(Path(words[0]), Path(words[1]))
    except GptoughtsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
