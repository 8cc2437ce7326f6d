"""Files of a model's folder that lead elsewhere, or hold what no such file holds, are refused before anything is copied or loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptoughts.config import hf_spec
from gptoughts.config.recipe import ModelConfig
from gptoughts.data.chat.template import templates_in
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.export import _base_files
from tests.inference.test_load import folder, here, trained  # noqa: F401 - a fixture

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n"


def linked(to: Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


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
        (origin / "base").symlink_to(made, target_is_directory=True)
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
