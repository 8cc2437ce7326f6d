#!/usr/bin/env bash
# Lint, types, import contracts and tests, in an environment of its own if none is active.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/test.sh [PYTEST FLAGS]

Makes the virtual environment .venv if none is active, installs gptoughts with its dev extra, and runs ruff, mypy,
lint-imports and pytest. Flags go to pytest: launch/test.sh -k bench
Two workers with one thread each unless told otherwise: with more threads than free cores, torch's tests crawl.
TEXT
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

enter dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$(dirname "$PYTHON")/lint-imports"
workers="$("$PYTHON" -c 'import os; print(min(2, os.cpu_count() or 1))')"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m pytest -n "$workers" "$@"
