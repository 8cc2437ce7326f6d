#!/usr/bin/env bash
# Train a DeepSeek model exactly and repeatably: float32, plain attention, no compilation.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/train_deepseek_stable.sh [RECIPE] [FLAGS]

Trains a model of DeepSeek-V3's architecture with the profile stable: float32 arithmetic, plain attention, no compilation. Slower than
train_deepseek_optimized.sh; repeated and resumed runs are bit-identical. Default recipe: deepseek-small, 189 M parameters.

  launch/train_deepseek_stable.sh deepseek-small --name first
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
# shellcheck source=launch/preset.sh
. launch/preset.sh

read_arguments "$@"
gptoughts train "${RECIPE:-deepseek-small}" --profile stable
