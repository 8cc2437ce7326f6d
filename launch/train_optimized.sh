#!/usr/bin/env bash
# Train with the layers that are expected to be fastest on this hardware.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/train_optimized.sh [RECIPE] [FLAGS]

Trains RECIPE with the profile of this hardware: the fastest layers that can run and are expected to pay off, each proven in a real
step. Default recipe: quickstart on a CPU, gpt-1b on a GPU.

  launch/train_optimized.sh gpt2-124m --name first
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
# shellcheck source=launch/preset.sh
. launch/preset.sh

read_arguments "$@"
gptoughts train ${RECIPE:+"$RECIPE"} --profile auto
