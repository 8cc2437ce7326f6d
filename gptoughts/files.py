"""Atomic file writes, file locks, and the user's cache folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

MAX_BYTES = 512 << 20
"""Size of a file that is read as a whole: tokenizers and question data sets have tens of megabytes."""
_SURROGATE = re.compile("[\ud800-\udfff]")
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
"""Errors of a path that is of another kind than expected, or that this user may not use."""
MAX_NESTING = 100
"""Depth of lists and tables in JSON and TOML; code that reads them recurses."""
TOO_DEEP = "nested too deeply"
TEMPORARY = ".tmp"
"""Part of the name of files that are being written; a kill can leave one."""


def cache_dir(*parts: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return `$XDG_CACHE_HOME/gptoughts/PARTS`, by default below scratch or ~/.cache. Does not create it."""
    root = environment.get("XDG_CACHE_HOME") or scratch_dir(environment) or Path.home() / ".cache"
    return Path(root).expanduser().joinpath("gptoughts", *parts)


def scratch_dir(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the cluster's folder for large files, where HOME has a quota: `$SCRATCH`, or `$SLURM_TMPDIR` in a job of one node.

    `$SLURM_TMPDIR` is a disk of each node, so the nodes of a larger job would not see each other's files. None if neither can be written.
    """
    names = ["SCRATCH"]
    if environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES")) == "1":
        names.append("SLURM_TMPDIR")
    found = [Path(environment[name]) for name in names if environment.get(name)]
    return next((path for path in found if path.is_absolute() and path.is_dir() and os.access(path, os.W_OK | os.X_OK)), None)


def make_private(folder: Path, new: bool = False) -> None:
    """Create a folder and its missing parents for this user alone, mode 0700. One that exists keeps its mode.

    Below a set-group-ID folder, the usual form of a group's shared folder, the group gets that folder's rights, as far as
    the umask allows. Raises FileExistsError if `new` and the folder exists, and OSError.
    """
    if not new and folder.is_dir():
        return
    if folder != folder.parent:
        make_private(folder.parent)
    above = folder.parent.stat().st_mode
    folder.mkdir(mode=0o700 | (above & 0o070 if above & stat.S_ISGID else 0), exist_ok=not new)


def open_to_all(folder: Path) -> Path | None:
    """Return the folder, or the first parent, in which every user of the machine can replace what is executed; None if there is none.

    In a parent with the sticky bit, as /tmp has, only the owner of a file replaces it.
    """
    place = folder.resolve()
    for here in (place, *place.parents):
        mode = here.stat().st_mode if here.exists() else 0
        if mode & stat.S_IWOTH and (here == place or not mode & stat.S_ISVTX):
            return here
    return None


def hub_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of Hugging Face's caches: `$HF_HOME`, else below `$XDG_CACHE_HOME`, scratch or ~/.cache."""
    if environment.get("HF_HOME"):
        return Path(environment["HF_HOME"]).expanduser()
    root = environment.get("XDG_CACHE_HOME") or scratch_dir(environment) or Path.home() / ".cache"
    return Path(root).expanduser() / "huggingface"


def regular(path: Path) -> Path:
    """Return a path that is a regular file, by way of links. Raises ValueError: a pipe would be waited for, a device has no end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    return path


def owned(path: Path) -> Path:
    """Return a regular file that is part of its folder: no link that leads elsewhere, except to the blobs of a hub's cache.

    What a downloaded folder links to, such as a private key, would be copied into checkpoints. Raises ValueError.
    """
    folder, target = path.parent.resolve(), regular(path).resolve()
    hubs = [above.parent for above in folder.parents if above.name == "snapshots" and above.parent.name.startswith("models--")]
    if not any(target.is_relative_to(place) for place in (folder, *(hub / "blobs" for hub in hubs))):
        raise ValueError("a link that leads out of its folder; replace it by a copy")
    return path


def is_file_name(name: str) -> bool:
    """Return whether a file can have this name: no slash, no NUL, valid Unicode, at most 255 bytes."""
    return 0 < len(name.encode("utf-8", "surrogatepass")) <= 255 and not set(name) & set("/\0") and not _SURROGATE.search(name)


def is_path(text: str) -> bool:
    """Return whether a file or folder can have this path."""
    parts = [part for part in text.split("/") if part]
    return len(text.encode("utf-8", "surrogatepass")) < 4096 and all(map(is_file_name, parts)) and "\0" not in text


def read_limited(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises OSError, ValueError."""
    with regular(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit >> 20} MiB")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for values that are nested too deeply."""
    opening = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if sum(map(text.count, opening)) > MAX_NESTING and depth_of(value) > MAX_NESTING:  # type: ignore[arg-type]
        raise ValueError(TOO_DEEP)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text. Raises ValueError, also for tables that are nested too deeply and integers beyond 64 bits."""
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if depth_of(found) > MAX_NESTING:
        raise ValueError(TOO_DEEP)
    level: list[Any] = [found]
    while level:
        value = level.pop()
        if isinstance(value, int) and value.bit_length() > 64:  # 0xfff...: Python could not print it
            raise ValueError("an integer of more than 64 bits")
        level += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found


def depth_of(value: Any) -> int:
    """Return how deep lists and tables are nested, at most MAX_NESTING + 1; 0 for a number or text. Does not recurse."""
    depth, level = 0, [value]
    while depth <= MAX_NESTING and (level := [one for one in level if isinstance(one, dict | list)]):
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def load_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """Return the value of a JSON file in UTF-8 of at most `limit` bytes. Raises OSError, ValueError."""
    return parse_json(read_limited(path, limit).decode("utf-8-sig"))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits. Raises OSError that names the file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


@contextmanager
def replacing(path: Path, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block succeeds, and is removed when the block fails.

    The temporary name is `name.tmp.suffix`; `shared` adds the process id, for files that several processes may write at once.
    `durable` syncs file and folder, so that the file survives a power loss.
    """
    process = f".{os.getpid()}" if shared else ""
    temporary = path.with_name(f"{path.stem}{process}{TEMPORARY}{path.suffix}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, durable: bool = False, shared: bool = False) -> None:
    """Write a UTF-8 file atomically. Raises OSError."""
    with replacing(path, durable, shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, durable: bool = False, shared: bool = False) -> None:
    """Write indented JSON atomically, with a final newline. Raises OSError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", durable, shared)


def sync(file: IO[Any]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


PROBE_BYTES = 4096


def writing_problem(folder: Path) -> str:
    """Write, sync and remove a small file in `folder`. Returns why that fails, an empty string if it does not."""
    probe = folder / f".probe.{os.getpid()}{TEMPORARY}"
    try:
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                sync(file)
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that this user may still write to the file system of `folder`; None where it does not tell. Quotas do not count."""
    try:
        state = os.statvfs(folder)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def first_link(folder: Path) -> Path | None:
    """Return `folder` or the first entry below it that is a symbolic link or a special file, None if all are plain."""
    for path in [folder, *sorted(folder.rglob("*"))]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            return path
    return None


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder exclusively, until it is closed. Returns False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file or folder exclusively, until it is closed; waits for the process that holds the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
