#!/usr/bin/env bash
# One training run on N GPUs of this machine, or in N CPU processes without GPUs.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/torchrun.sh N [RECIPE] [FLAGS]

Finds or creates the Python environment, then runs `gptoughts train RECIPE --ranks N FLAGS`, which starts N ranks on this machine.

  launch/torchrun.sh 8 gpt-1b --name first
TEXT
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    '' | *[!0-9]* | 0)
        usage >&2
        exit 2
        ;;
esac
ranks="$1"
shift

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

enter train
exec "$PYTHON" -m gptoughts train "$@" --ranks "$ranks"
