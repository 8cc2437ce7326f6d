#!/usr/bin/env bash
# Train with the fastest layers and the largest micro-batch that fit this hardware.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/train_max_gpu.sh [RECIPE] [FLAGS]

Trains RECIPE with the profile of this hardware, and measures at the start which micro-batch is the largest that fits; the global batch
stays. Default recipe: quickstart on a CPU, gpt-1b on a GPU.

  launch/train_max_gpu.sh gpt-1b --name first
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
# shellcheck source=launch/preset.sh
. launch/preset.sh

read_arguments "$@"
gptoughts train ${RECIPE:+"$RECIPE"} --profile auto --layer.microbatch auto
