"""Change a valid file: bytes, JSON values at any depth, lines of TOML and CSV, headers of safetensors. Deterministic for a seed."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Step = tuple[str, int]
"""Name of a mutation, and the seed of its choices."""
WORDS = (
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**48,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
)
RAW = {
    "digits": "9" * 5000,
    "fraction": "0." + "3" * 5000,
    "exponent": "1e99999",
    "lists": "[" * 3000 + "]" * 3000,
    "open lists": "[" * 100_000,
    "tables": '{"a":' * 2000 + "1" + "}" * 2000,
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "true": "True",
}
"""Texts in place of a JSON value that json.dumps would not write."""
TEXTS = (
    "", "x", "0", "1", "-1", "true", "none", "../x", "/etc/passwd", "/dev/zero", "\0", "a\0b", "\ud800", "\x1b[2J\x1b]0;x\x07", "a\r\nb", "\u202e", "é",
    "世界", "a" * 5000, "{{ 1 }}", "%s%n", "float16", "🎉" * 300, "nan", "1e400", ".", "..", "~", "a b", " ", "\ufeff", "package:os", "https://u:p@x/",
)  # fmt: skip
Value = Any


def plain_value(chance: random.Random) -> Value:
    """Return a value of any JSON type."""
    kind = chance.randrange(8)
    if kind == 0:
        return None
    if kind == 1:
        return chance.random() < 0.5
    if kind == 2:
        return chance.choice((1, -1)) * chance.choice(WORDS)
    if kind == 3:
        return chance.choice((0.0, -0.0, 0.5, -1.5, 1e-320, 1e30, 1e308, -1e308, 3.0))
    if kind == 4:
        return chance.choice(TEXTS)
    if kind == 5:
        return [plain_value(chance) for _ in range(chance.randrange(4))]
    if kind == 6:
        return {chance.choice(TEXTS): plain_value(chance) for _ in range(chance.randrange(4))}
    value: Value = chance.choice(([], {}, 1))
    for _ in range(chance.choice((3, 40, 70, 130))):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


# --- JSON


def nodes(value: Value) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key or index) of every value below the top."""
    level = [value]
    while level:
        holder = level.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            yield holder, key
            level.append(holder[key])


def change_json(top: Value, chance: random.Random) -> tuple[Value, dict[str, str]]:
    """Return a JSON value with one change, and texts for its placeholders."""
    places = list(nodes(top))
    if not places or chance.random() < 0.02:
        return plain_value(chance), {}
    holder, key = chance.choice(places)
    what = chance.randrange(12)
    if what <= 3:
        holder[key] = plain_value(chance)
    elif what == 4:
        del holder[key]
    elif what == 5 and isinstance(holder, dict):
        holder[chance.choice((*TEXTS, *(str(other) for _, other in places[:50])))] = holder.pop(key)
    elif what == 6:
        other, place = chance.choice(places)
        holder[key], other[place] = other[place], holder[key]
        return (top, {}) if _is_tree(top) else (plain_value(chance), {})
    elif what == 7 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * chance.choice((1, 2, 50))
    elif what == 8 and isinstance(holder[key], str):
        text = holder[key]
        cut = chance.randrange(len(text) + 1)
        holder[key] = text[:cut] + chance.choice(TEXTS) + text[cut + chance.randrange(3) :]
    elif what == 9 and type(holder[key]) in (int, float):
        number = holder[key]
        holder[key] = chance.choice(
            (number + 1, number - 1, -number, number * 2**20, float(number), str(number), [number], number * 2 + 1)
        )
    elif what == 10:
        mark = "@raw@"
        holder[key] = mark
        return top, {json.dumps(mark): chance.choice(list(RAW.values()))}
    else:
        mark = "@twice@"
        name = json.dumps(str(key))
        if isinstance(holder, dict):
            value = json.dumps(holder[key])
            holder[key] = mark
            return top, {json.dumps(mark): f"{value}, {name}: {json.dumps(plain_value(chance))}"}
        holder[key] = plain_value(chance)
    return top, {}


def _is_tree(top: Value) -> bool:
    """Return whether a swap has not put a value into itself."""
    try:
        json.dumps(top)
    except (ValueError, RecursionError):
        return False
    return True


def json_step(content: bytes, chance: random.Random) -> bytes:
    """Change one value of a JSON file."""
    top, texts = change_json(json.loads(content.decode("utf-8-sig")), chance)
    text = json.dumps(top, ensure_ascii=chance.random() < 0.7)
    for mark, raw in texts.items():
        text = text.replace(mark, raw, 1)
    return text.encode("utf-8", "surrogatepass")


def jsonl_step(content: bytes, chance: random.Random) -> bytes:
    """Change one value of one row of a JSON Lines file."""
    lines = content.split(b"\n")
    at = chance.choice([index for index, line in enumerate(lines) if line.strip()])
    lines[at] = json_step(lines[at], chance)
    return b"\n".join(lines)


def safetensors_step(content: bytes, chance: random.Random) -> bytes:
    """Change one value of the header of a safetensors file; its length is right most of the time."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    changed = json_step(header, chance)
    told = len(changed) if chance.random() < 0.9 else chance.choice(WORDS) % 2**64
    return struct.pack("<Q", told) + changed + body


# --- text


def toml_step(content: bytes, chance: random.Random) -> bytes:
    """Change a key, value or table of a TOML file."""
    lines = content.decode().split("\n")
    given = [index for index, line in enumerate(lines) if "=" in line]
    at = chance.choice(given)
    key, _, value = lines[at].partition("=")
    what = chance.randrange(8)
    if what <= 2:
        lines[at] = f"{key}= {toml_value(chance)}"
    elif what == 3:
        lines[at] = f"{key}.{chance.choice(('a', 'name', '0', key.strip()))} = {value}"
    elif what == 4:
        lines.insert(chance.randrange(len(lines) + 1), lines[at])
    elif what == 5:
        lines.insert(
            chance.randrange(len(lines) + 1),
            chance.choice(("[a]", "[[model]]", "[model]", "[slots]", "[" + "a." * 1200 + "a]", "[slurm]")),
        )
    elif what == 6:
        other = lines[chance.choice(given)].partition("=")[2]
        lines[at] = f"{key}={other}"
    else:
        del lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def toml_value(chance: random.Random) -> str:
    """Return a TOML value of any type."""
    value = plain_value(chance)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(chance)}" for key in value) + "}"
    special = (
        "nan",
        "inf",
        "-inf",
        "1979-05-27",
        "07:32:00",
        "[" * 2000 + "]" * 2000,
        "{a = " * 500 + "1" + "}" * 500,
        "0x" + "f" * 4000,
        "'''x'''",
    )
    return chance.choice(special) if value is None else json.dumps(value, ensure_ascii=False)


def csv_step(content: bytes, chance: random.Random) -> bytes:
    """Change a field of a CSV file."""
    lines = content.decode().split("\n")
    at = chance.randrange(len(lines))
    fields = lines[at].split(",")
    fields[chance.randrange(len(fields))] = chance.choice((*TEXTS, '"', '""', '"a,b"', '"\n', "a" * 200_000))
    lines[at] = ",".join(fields)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def number_step(content: bytes, chance: random.Random) -> bytes:
    """Replace a decimal number of a text."""
    found = list(re.finditer(rb"-?\d+", content))
    if not found:
        return flip(content, chance)
    match = chance.choice(found)
    return content[: match.start()] + str(chance.choice(WORDS)).encode() + content[match.end() :]


# --- bytes


def flip(content: bytes, chance: random.Random) -> bytes:
    """Flip one to four bits."""
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    """Cut the file off."""
    return content[: chance.randrange(len(content) + 1)]


def drop(content: bytes, chance: random.Random) -> bytes:
    """Remove some bytes."""
    start = chance.randrange(len(content) + 1)
    return content[:start] + content[start + chance.choice((1, 2, 8, 100)) :]


def insert(content: bytes, chance: random.Random) -> bytes:
    """Insert some bytes."""
    start = chance.randrange(len(content) + 1)
    return (
        content[:start]
        + chance.choice((b"\0", b"\xff", b"\n", b"\xc3\x28", b"\xed\xa0\x80", b"{", b"]", b'"', bytes(64), b"\x1b[2J"))
        + content[start:]
    )


def repeat(content: bytes, chance: random.Random) -> bytes:
    """Repeat a part of the file."""
    start = chance.randrange(len(content) + 1)
    end = min(len(content), start + chance.choice((1, 8, 64, 1000)))
    return content[:end] + content[start:end] * chance.choice((1, 3, 40)) + content[end:]


def word(content: bytes, chance: random.Random) -> bytes:
    """Replace four or eight bytes by a number at the edge of its range."""
    size = chance.choice((4, 8))
    start = chance.randrange(max(1, min(len(content), 4096) - size))
    return content[:start] + (chance.choice(WORDS) % 2 ** (8 * size)).to_bytes(size, "little") + content[start + size :]


def encode(content: bytes, chance: random.Random) -> bytes:
    """Write the text in another encoding."""
    text = content.decode("utf-8", "replace")
    return chance.choice(
        (
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.encode("latin-1", "replace"),
            b"\xef\xbb\xbf" + content,
            b"\xef\xbb\xbf" * 2 + content,
        )
    )


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip, "cut": cut, "drop": drop, "insert": insert, "repeat": repeat, "word": word, "encode": encode, "number": number_step,
}  # fmt: skip
KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": json_step, "jsonl": jsonl_step, "safetensors": safetensors_step, "toml": toml_step, "csv": csv_step, "binary": word, "text": number_step,
}  # fmt: skip
"""The change that knows the format of a file."""
NAMES = ("format", "format", "format", "format", *BYTES)
"""Mutations to choose from; half of them know the format."""


def mutated(content: bytes, kind: str, steps: Sequence[Step]) -> bytes:
    """Return the file after all steps. A step that needs the format flips bits of a file that has lost it."""
    for name, seed in steps:
        chance = random.Random(seed)
        step = KINDS[kind] if name == "format" else BYTES[name]
        try:
            content = step(content, chance)
        except (ValueError, IndexError, RecursionError, struct.error, TypeError):
            content = flip(content, chance)
        content = content[: 4 << 20]
    return content
