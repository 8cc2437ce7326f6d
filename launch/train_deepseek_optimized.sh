#!/usr/bin/env bash
# Train a DeepSeek model with the fastest layers and the largest micro-batch that fit this hardware.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/train_deepseek_optimized.sh [RECIPE] [FLAGS]

Trains a model of DeepSeek-V3's architecture (latent attention, mixture of experts) with the profile of this hardware and the largest
micro-batch that fits. Default recipe: deepseek-small, 189 M parameters; also deepseek-medium, deepseek-large, deepseek-sft.

  launch/train_deepseek_optimized.sh deepseek-medium --name first
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
# shellcheck source=launch/preset.sh
. launch/preset.sh

read_arguments "$@"
gptoughts train "${RECIPE:-deepseek-small}" --profile auto --layer.microbatch auto
