"""Files of a model's folder that lead elsewhere, or hold what no such file holds, are refused before anything is copied or loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gptoughts.config import hf_spec
from gptoughts.config.recipe import ModelConfig
from gptoughts.data.chat.template import templates_in
from gptoughts.errors import CheckpointError, ConfigError, DataError
from gptoughts.inference import load as loading
from gptoughts.inference.export import _base_files
from gptoughts.inference.generate import offloaded
from gptoughts.models.adapters.folder import read_config
from gptoughts.models.hf import gguf
from gptoughts.models.hf.weights import Pretrained
from gptoughts.models.weight_files import INDEX, SINGLE
from tests.inference.test_load import folder, here, trained  # noqa: F401 - a fixture

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n"


# --- what is copied into checkpoints


@pytest.mark.parametrize("name", hf_spec.KEPT)
def test_a_key_that_a_model_folder_links_to_is_not_kept(name: str, here: Path) -> None:  # noqa: F811
    key = here / "id_rsa"
    key.write_text(KEY if name.endswith(".jinja") else '{"auth": "secret"}')
    made = folder("model")
    (made / name).unlink(missing_ok=True)
    (made / name).symlink_to(key)
    for read in (lambda: hf_spec.documents(ModelConfig(family="hf", path="model")), lambda: _base_files_of(made)):
        with pytest.raises(ConfigError, match=rf"{name}: cannot be kept .*a link that leads out of its folder"):
            read()
    (made / name).unlink()
    (made / "other").write_text('{"auth": "secret"}')
    (made / name).symlink_to("other")
    assert "secret" in hf_spec.documents(ModelConfig(family="hf", path="model"))[name], "the control, in its own folder"


def _base_files_of(made: Path) -> object:
    """What an export takes from a checkpoint whose base/ has the links of `made`."""
    origin = made.parent / "checkpoint"
    origin.mkdir(exist_ok=True)
    if not (origin / "base").exists():
        (origin / "base").symlink_to(made.resolve(), target_is_directory=True)
    return _base_files(origin, None)  # type: ignore[arg-type]  # the recipe is read only without base/


@pytest.mark.parametrize("content", [b'{"a": "\xff"}', KEY.encode(), b"[1]", b"[" * 10**5])
def test_what_is_not_json_stops_a_training_before_its_first_step(content: bytes, here: Path) -> None:  # noqa: F811
    made = folder("model")
    (made / "special_tokens_map.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"special_tokens_map.json: cannot be kept with the weights"):
        trained("run", **{"model.path": "model", "train.steps": 2})
    assert not list(here.rglob("step-*"))


def test_links_of_a_hubs_cache_are_followed_to_its_blobs_only(tmp_path: Path) -> None:
    hub = tmp_path / "models--a--b"
    snapshot = hub / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    (hub / "blobs" / "x").write_text("{}")
    (tmp_path / "x").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/x")
    assert hf_spec.kept_texts(snapshot, hf_spec.KEPT) == {"tokenizer.json": "{}"}
    (snapshot / "generation_config.json").symlink_to("../../../x")
    with pytest.raises(ConfigError, match=r"generation_config.json: cannot be kept"):
        hf_spec.kept_texts(snapshot, hf_spec.KEPT)


def test_a_chat_template_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text(KEY)
    made = tmp_path / "model"
    made.mkdir()
    (made / "chat_template.jinja").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(DataError, match=r"chat_template.jinja: cannot be read \(a link that leads out of its folder"):
        templates_in(made)
    assert templates_in(made.parent) == {}


# --- what is loaded beside the weights


def adapter(place: Path, base: str) -> None:
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    (place / "adapter_model.safetensors").write_bytes((2**62).to_bytes(8, "little"))


def test_an_adapter_beside_a_model_is_refused(here: Path) -> None:  # noqa: F811
    made = folder("model")
    adapter(made, "elsewhere")
    for read in (lambda: trained("run", **{"model.path": "model"}), lambda: offloaded.opened(made, 1.0, None)):
        with pytest.raises(
            CheckpointError, match=r"adapter_config.json: an adapter beside a model would change what is loaded"
        ):
            read()
    (made / "adapter_config.json").unlink()
    assert offloaded.opened(made, 1.0, None).vocab_size, "the control"


@pytest.mark.parametrize("kind", ["index", "header"])
def test_offloading_checks_index_and_header(kind: str, here: Path) -> None:  # noqa: F811
    made = folder("model")
    (made / SINGLE).rename(here / "out.safetensors")
    if kind == "index":
        names = dict.fromkeys(["model.embed_tokens.weight"], "../out.safetensors")
        (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        (made / SINGLE).write_bytes((2**62).to_bytes(8, "little") + bytes(8))
    with pytest.raises(CheckpointError, match=r"must be a file name in this folder|longer than the file"):
        offloaded.opened(made, 1.0, None)


@pytest.mark.skipif(find_spec("gguf") is None, reason="pip install gguf")
def test_files_beside_a_gguf_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    seen: list[list[str]] = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda place, **_: seen.append([p.name for p in Path(place).iterdir()]),
    )
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    adapter(tmp_path, "elsewhere")
    with pytest.raises(CheckpointError):
        gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert seen == [["m.gguf"]]


# --- regular expressions of an adapter

HANG = "((([a-z_.0-9])+)+)+!"


@pytest.mark.parametrize(
    ("key", "value"),
    [("target_modules", HANG), ("target_modules", ["q_proj", HANG]), ("exclude_modules", HANG), ("layers_pattern", HANG),
     ("layers_pattern", [HANG]), ("rank_pattern", {HANG: 4}), ("alpha_pattern", {HANG: 4})],
)  # fmt: skip
def test_an_adapter_cannot_bring_a_regular_expression(key: str, value: object, tmp_path: Path) -> None:
    content = {"peft_type": "LORA", "base_model_name_or_path": "x", key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: {key} must hold plain names, no regular expressions"):
        read_config(tmp_path)


def test_control_plain_names_are_read_and_the_expression_alone_does_not_end(tmp_path: Path) -> None:
    for value in ("all-linear", "q_proj", ["q_proj", "layers.0.mlp.up_proj"], None):
        content = {"peft_type": "LORA", "target_modules": value, "rank_pattern": {"layers.0.q_proj": 4}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        assert read_config(tmp_path)["target_modules"] == value
    code = f"import re; re.fullmatch({HANG!r}, 'base_model.model.layers.0.self_attn.q_proj')"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code], timeout=2, check=False)


# --- sizes that no file of weights holds


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_a_config_larger_than_its_weights_is_refused_before_it_is_allocated(key: str, here: Path) -> None:  # noqa: F811
    made = folder("model")
    content = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**content, key: 2**31 - 1}))
    for read in (lambda: Pretrained(made), lambda: offloaded.opened(made, 1.0, None)):
        with pytest.raises(CheckpointError, match=r"config.json: describes [\d,]+ parameters, more than the files"):
            read()
    (made / "config.json").write_text(json.dumps(content))
    assert Pretrained(made).unused() == [], "the control"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("model.width", 2**16, "gives .* the shape"), ("data.sequence_length", 2**28, "tables of positions of 268,435,456 tokens need"),
    ],
)  # fmt: skip
def test_a_checkpoint_larger_than_its_weights_is_refused(
    key: str,
    value: int,
    said: str,
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "read_free_bytes", lambda: 1 << 30)
    checkpoint = trained("run", **{"model.depth": 1, "model.width": 64, "model.heads": 2})
    recipe, step = loading.trained_recipe(checkpoint, None)
    table, name = key.split(".")
    part = getattr(recipe, table).model_copy(update={name: value})
    larger = recipe.model_copy(update={table: part})
    for wanted, given in ((None, recipe), (said, larger)):
        parts = loading.model_bundle(given, loading.Tokenizer.load(checkpoint / "tokenizer"), {}, {}, None)

        def check(given: object = given, parts: object = parts) -> None:
            loading.check_tables(given, "state.json")  # type: ignore[arg-type]
            model = loading.meta_model(given, parts.family, parts.rows)  # type: ignore[arg-type, attr-defined]
            loading.check_shapes(checkpoint, model, False)

        if wanted is None:
            check()
        else:
            with pytest.raises(CheckpointError, match=wanted):
                check()
    assert step == 1
