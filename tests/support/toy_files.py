"""Every shipped recipe at a size of seconds: files that stand for its model and data, and the flags that name them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from gptoughts.config.hf_spec import SHIPPED
from gptoughts.config.loader import load

ROOT = Path(__file__).resolve().parents[2]
FINE_TUNING = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")

TINY = [
    "--data.sequence-length",
    "32",
    "--train.global-batch",
    "4",
    "--eval.batches",
    "1",
    "--sample.tokens",
    "4",
    "--layer.compile",
    "eager",
]
NATIVE = ["--model.depth", "1", "--model.width", "64", "--model.heads", "2"]
MIXTURE = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
"""A DeepSeek of a shipped config's kind, small enough for one core."""


def sizes(name: str, words: Sequence[str] = ()) -> list[str]:
    """The flags that make a recipe cost seconds. `words` is the rest of its command line."""
    recipe = load(name).recipe
    more = list(TINY) if "--data.format" not in words else [*TINY[2:], "--data.sequence-length", "64"]
    if recipe.model.config:
        more += ["--model.config", "mixture.json"]
    elif recipe.objective == "question-answering":
        more += ["--model.path", "encoder", "--data.sequence-length", "48", "--data.stride", "16"]
    elif recipe.model.path is None:
        more += NATIVE
    if recipe.data.path == "python-stdlib" and "--data.path" not in words:
        more += ["--data.path", "my-text.txt", "--data.tokenizer", "bytes"]
    if recipe.model.vocab_size:
        more += ["--model.vocab-size", "320"]
    return more


def make_toys(here: Path) -> None:
    """Fill `here`, the current folder: the tiny model and data of docs/fine-tuning.md, an encoder, questions, a mixture's config, Parquet."""
    script = re.search(r"^python - <<'END'\n(.*?)^END$", FINE_TUNING, re.MULTILINE | re.DOTALL)
    assert script is not None
    exec(compile(script[1], "docs/fine-tuning.md", "exec"), {})  # its own words: the page's tiny model, chat.jsonl, my-text.txt
    Path("data").mkdir()
    Path("data/tinyshakespeare.txt").write_text("To be, or not to be, that is the question:\n" * 60, encoding="utf-8")
    shipped = json.loads((SHIPPED / "deepseek-small.json").read_text(encoding="utf-8"))
    Path("mixture.json").write_text(json.dumps(shipped | MIXTURE), encoding="utf-8")
    (here / "tests").symlink_to(ROOT / "tests")
    make_encoder(Path("encoder"))
    make_questions()
    make_parquet(Path("fineweb/sample/10BT"))


def make_encoder(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator(
        [context(number) for number in range(40)], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=library, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=library.get_vocab_size(), max_position_embeddings=64, **sizes)
    BertForQuestionAnswering(config).save_pretrained(folder)


def context(number: int) -> str:
    return f"The box number {number} holds {number + 1} stones and a letter from a friend."


def make_questions() -> None:
    for name, numbers in (("train-v2.0.json", range(24)), ("dev-v2.0.json", range(24, 32))):
        paragraphs = []
        for number in numbers:
            text, answer = context(number), f"{number + 1} stones"
            asked = {
                "id": f"{number}",
                "question": "What is in the box?",
                "answers": [{"text": answer, "answer_start": text.index(answer)}],
            }
            unanswered = {"id": f"{number}-none", "question": "Who painted it?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": text, "qas": [asked, unanswered]})
        articles = [{"title": name, "paragraphs": paragraphs}]
        Path(name).write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")


def make_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    texts = [f"Lesson {number}: water boils at a lower temperature on a mountain." for number in range(200)]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "000_00000.parquet")
