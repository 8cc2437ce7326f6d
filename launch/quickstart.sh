#!/usr/bin/env bash
# From a fresh clone to a trained model: creates .venv if no environment is active, installs, trains.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/quickstart.sh [RECIPE] [FLAGS]

Creates the virtual environment .venv if none is active, installs gptoughts with its train extra, and runs
`gptoughts train RECIPE FLAGS`. Default recipe: quickstart on a CPU (about two minutes on two cores), gpt-1b on a GPU.
An installed torch is not replaced. Without an NVIDIA driver the CPU build is preferred.

  launch/quickstart.sh --train.steps 100        a shorter run
  launch/quickstart.sh --name first              a named run: the same command resumes it
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

enter train
"$PYTHON" -m gptoughts train "$@"

echo
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    case "$PYTHON" in
        "$PWD/.venv/"*) echo "next: . .venv/bin/activate" ;;
        *) echo "next: $(dirname "$PYTHON")/gptoughts --help" ;;
    esac
fi
