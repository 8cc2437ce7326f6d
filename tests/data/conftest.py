"""What the tests of chat data share."""

from pathlib import Path

import pytest

from tests.support.chat_parts import FAMILIES, resolve_model_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of chat tokenizer."""
    root = tmp_path_factory.mktemp("families")
    return {family: resolve_model_folder(family, root / family) for family in FAMILIES}
