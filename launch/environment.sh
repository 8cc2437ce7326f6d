# Sourced by the other scripts: finds or creates the Python environment and installs this checkout into it.
# `enter EXTRA` sets PYTHON to an interpreter that has gptoughts with that extra.
# shellcheck shell=bash

CPU_WHEELS="https://download.pytorch.org/whl/cpu"
TORCH_RANGE="torch>=2.10,<2.14"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

recent() { # PYTHON: succeeds for version 3.11 or newer
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

in_environment() { # PYTHON: succeeds in a virtual environment
    "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' >/dev/null 2>&1
}

has_torch() { # PYTHON
    "$1" -c 'from importlib.metadata import version; version("torch")' >/dev/null 2>&1
}

find_python() { # sets PYTHON to an interpreter of 3.11 or newer
    local name
    for name in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null 2>&1 && recent "$name"; then
            PYTHON="$(command -v "$name")"
            return
        fi
    done
    fail "Python 3.11 or newer is required. Found $(python3 --version 2>&1 || echo none)."
}

choose_environment() { # sets PYTHON to that of the active environment, or of .venv, created if missing
    local prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [ -n "$prefix" ]; then
        PYTHON="$prefix/bin/python"
        recent "$PYTHON" || fail "$prefix: the active environment has no Python 3.11 or newer"
        return
    fi
    if [ -x .venv/bin/python ] && recent .venv/bin/python; then
        PYTHON="$PWD/.venv/bin/python"
        return
    fi
    find_python
    if in_environment "$PYTHON"; then
        return
    fi
    make_environment
    PYTHON="$PWD/.venv/bin/python"
}

make_environment() { # creates .venv with PYTHON; uses the system's torch if there is one
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot create virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
    echo "creating the virtual environment .venv with $("$PYTHON" --version)"
    if has_torch "$PYTHON"; then
        "$PYTHON" -m venv --clear --system-site-packages .venv
    else
        "$PYTHON" -m venv --clear .venv
    fi
}

pip_install() {
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --upgrade >/dev/null
    "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check "$@"
}

has_driver() { # succeeds if there is an NVIDIA driver for a CUDA build of torch
    [ -e /proc/driver/nvidia/version ] || [ -e /dev/dxg ] || command -v nvidia-smi >/dev/null 2>&1
}

reachable() { # URL: succeeds if it answers within a few seconds; a thread, because name resolution has no timeout
    "$PYTHON" - "$1" <<'PY'
import os, sys, threading, urllib.request

def ask() -> None:
    with urllib.request.urlopen(sys.argv[1], timeout=5) as answer:
        os._exit(0 if answer.status == 200 else 1)

threading.excepthook = lambda _: os._exit(1)
thread = threading.Thread(target=ask, daemon=True)
thread.start()
thread.join(8)
os._exit(1)
PY
}

install_torch() { # without a driver the CPU build if available: a twentieth of the size
    if [ "$(uname -s)" = Linux ] && ! has_driver && reachable "$CPU_WHEELS/torch/"; then
        echo "installing torch, the CPU build"
        pip_install --extra-index-url "$CPU_WHEELS" "$TORCH_RANGE"
    else
        echo "installing torch"
        pip_install "$TORCH_RANGE"
    fi
}

install() { # EXTRA: installs this checkout as editable; never replaces an installed torch
    local extra="$1" held
    held="$(mktemp)"
    has_torch "$PYTHON" || install_torch
    "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$held"
    echo "installing gptoughts[$extra] beside $(cat "$held")"
    if ! pip_install --constraint "$held" --editable ".[$extra]"; then
        rm -f "$held"
        fail "installation failed. The installed torch is not replaced; gptoughts needs $TORCH_RANGE."
    fi
    rm -f "$held"
}

enter() { # EXTRA: run in the repository's root
    choose_environment
    if ! "$PYTHON" launch/installed.py "$1"; then
        install "$1"
    fi
}
