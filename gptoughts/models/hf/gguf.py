"""Convert a GGUF file to a Hugging Face folder. Weights become float32.

Run once per file, in its own process, by `config.model_path.resolve_model_folder`. Config, tokenizer and weights all come from the file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import torch

from gptoughts.console import print_line
from gptoughts.errors import CheckpointError, GptoughtsError
from gptoughts.files import make_private


def convert(gguf: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of `gguf` into `folder`. Raises CheckpointError."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gguf as _reader  # noqa: F401  # used by transformers
    except ImportError:
        raise CheckpointError(f"{gguf}: needs the package gguf", fix="pip install gguf") from None
    import transformers

    try:
        # A folder without other files: an adapter_config.json beside the file would be followed to another model.
        with TemporaryDirectory() as place:
            (Path(place) / gguf.name).symlink_to(gguf.resolve())
            kwargs = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
            model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **kwargs)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **kwargs)
    except Exception as error:  # transformers' reader raises struct.error, IndexError and others for invalid files
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{gguf}: {reason[:300]}") from error
    config = model.config
    # The weights are dequantized; with this key transformers would refuse to save and train them.
    config.__dict__.pop("quantization_config", None)
    setattr(model, "hf_quantizer", None)  # noqa: B010  # an attribute of transformers that its types omit
    make_private(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check(folder, gguf)


def _check(folder: Path, gguf: Path) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in content or not (folder / "tokenizer.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{gguf}: conversion gave quantized weights or no tokenizer.json")


def serve(requests: IO[bytes], answers: IO[bytes], gguf: str, folder: str) -> None:
    """Convert in a child process: print an error as one line on stderr and exit with its code."""
    try:
        convert(Path(gguf), Path(folder))
    except GptoughtsError as error:
        print_line(str(error).replace("\n ", ""), sys.stderr)
        sys.exit(error.exit_code)
