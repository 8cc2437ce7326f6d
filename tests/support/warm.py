"""Processes that begin with torch already imported: what a command line does is tested a hundred times, and the import once.

A server imports what every verb imports and then only forks. A fork gets the caller's folder, variables, streams and words, and plans as a
process that begins. `command(...)` is the program to start instead of `python -m gptoughts ...`, `script(...)` instead of `python -c ...`.
What the forks share, and a test must not be about: what is imported already, and the seed of string hashes. What is about processes
themselves (signals, kill -9, a restart with other variables, imports, bits that two processes must share) is tested with real ones.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypedDict

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "torch", "torch._dynamo", "torch.profiler", "matplotlib.pyplot", "numpy", "safetensors.torch", "tokenizers",
    "transformers.modeling_utils",
    "gptoughts.run.run", "gptoughts.inference.load", "gptoughts.layers", "gptoughts.models.hf.family", "pytest",
)  # fmt: skip
LASTING = (
    "OMP_", "MKL_", "OPENBLAS_", "KMP_", "PYTORCH_", "TORCH", "CUDA_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "MPL", "LD_", "PYTHON", "XDG_",
    "HOME",
)  # fmt: skip
"""Variables that count when something is imported begin like this: each set of their values has a server of its own."""


class TrainingJob(TypedDict):
    """What a caller hands over, beside its streams."""

    words: list[str]
    environment: dict[str, str]
    folder: str


_servers: dict[str, tuple[subprocess.Popen[bytes], str]] = {}


def command(*words: str, environment: dict[str, str] | None = None) -> list[str]:
    """The start of `gptoughts words`, for a process that will have `environment`."""
    return [*_client(environment), "gptoughts", *words]


def script(text: str, environment: dict[str, str] | None = None) -> list[str]:
    """The start of `python -c text`."""
    return [*_client(environment), "-c", text]


def lasting(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` counts at an import."""
    return {name: value for name, value in sorted(environment.items()) if name.startswith(LASTING)}


IMPORTED_WITH = lasting(os.environ)


def _client(environment: dict[str, str] | None) -> list[str]:
    given = dict(os.environ if environment is None else environment)
    key = json.dumps(lasting(given))
    if key not in _servers:
        place = str(Path(tempfile.mkdtemp(prefix="warm-")) / "socket")
        server = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.support.warm import serve; serve({place!r})"],
            env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        _servers[key] = server, place
    # -I -S: it needs nothing but the standard library, and starts in a few milliseconds.
    return [sys.executable, "-I", "-S", str(Path(__file__)), _servers[key][1]]


@atexit.register
def _end() -> None:
    for server, place in _servers.values():
        assert server.stdin is not None
        server.stdin.close()
        server.wait(10)
        Path(place).unlink(missing_ok=True)
        Path(place).parent.rmdir()


# --- the server


def serve(place: str) -> NoReturn:
    """Import, then fork for each caller until standard input closes."""
    import importlib

    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen()
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([listening.fileno(), 0], [], [])
        if 0 in ready:
            os._exit(0)
        caller = listening.accept()[0]
        if os.fork() == 0:
            listening.close()
            _minded(caller)
        caller.close()
        while _reaped():
            pass


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _minded(caller: socket.socket) -> NoReturn:
    """Fork once more: one side becomes the command, the other waits for it, ends it where its caller has gone, and tells."""
    text, streams, _, _ = socket.recv_fds(caller, 1 << 22, 3)
    while not text.endswith(b"\n"):
        part = caller.recv(1 << 22)
        if not part:  # its caller has gone before it had said all
            os._exit(1)
        text += part
    order: TrainingJob = json.loads(text)
    child = os.fork()
    if child == 0:
        caller.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _leave(_left_by(lambda: _become(order)))
    for stream in (*streams, 0, 1, 2):
        os.close(stream)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        ready, _, _ = select.select([caller], [], [], 0.005)
        if ready:  # nothing is sent twice: its end was closed
            os.kill(child, signal.SIGKILL)


def _left_by(work: Callable[[], None]) -> int:
    """The exit code that the interpreter would leave with."""
    try:
        work()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """End as the interpreter does, but for taking everything apart that was imported: that would copy what the fork shares."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit.unregister(_end)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become(order: TrainingJob) -> None:
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    first, *rest = order["words"]
    sys.argv, sys.orig_argv[:] = [first, *rest], [sys.executable, *([first] if first == "-c" else ["-m", first]), *rest]
    if lasting(order["environment"]) != IMPORTED_WITH:  # a shell has set another one on the way here
        os.execve(sys.executable, sys.orig_argv, order["environment"])
    gc.unfreeze()
    import numpy

    from gptoughts.planning import environment

    numpy.random.seed()
    # Its variables are what they would be, so plans are those of a process that begins.
    environment.torch_is_loaded = lambda: False
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False, buffering=-1 if number < 2 else 1)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = program = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(program))
        return
    from gptoughts.cli.main import main

    main()


# --- the caller


def call(place: str, words: list[str]) -> NoReturn:
    """Hand words, folder, variables and streams to the server, and leave as the command left."""
    order = json.dumps({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}) + "\n"
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        streams = array.array("i", [0, 1, 2])
        data = order.encode()
        sent = server.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        server.sendall(data[sent:])
        code = int(server.makefile().readline())
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    call(sys.argv[1], sys.argv[2:])
