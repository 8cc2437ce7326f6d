"""Remove secrets from what is sent to trackers: values of secret environment variables, secret keys, passwords in addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
_SECRET_NAME = re.compile(
    r"(^|[_.\- ])((api|access|private|secret)[_\-]?key|key|token|secret|password|passwd|credentials?)$", re.I
)
_NOT_SECRET = ("text_key", "mask_token")
"""Fields of a recipe whose names end as those of secrets do."""
_KNOWN = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}")
"""Forms of tokens that are secret wherever they stand."""
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
SHORTEST = 6
"""Shorter values of variables are ordinary words too."""


def is_secret_name(name: str) -> bool:
    """Return whether a key or an environment variable of this name holds a secret."""
    return name not in _NOT_SECRET and bool(_SECRET_NAME.search(name))


class Redactor:
    """Replaces secrets in text, lists and tables by `[redacted]`. Takes the secret variables of `environment` as they are now."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        secrets = {value for name, value in environment.items() if is_secret_name(name) and len(value) >= SHORTEST}
        words = [re.escape(value) for value in sorted(secrets, key=len, reverse=True)]
        self._pattern = re.compile("|".join([*words, _KNOWN.pattern, _IN_ADDRESS.pattern]))

    def __call__(self, value: Any) -> Any:
        """Return `value` without secrets; of a table, also without the texts of secret keys."""
        if isinstance(value, str):
            return self._pattern.sub(HIDDEN, value)
        if isinstance(value, Mapping):
            return {
                key: HIDDEN if isinstance(one, str) and is_secret_name(str(key)) else self(one) for key, one in value.items()
            }
        return [self(one) for one in value] if isinstance(value, list | tuple) else value
