#!/usr/bin/env bash
# What only a GPU can show, in stages of at most 8 minutes. Each writes JSON after every measurement and skips what it already holds.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/device/run.sh STAGE [--tiny] [--seconds N] [--only WORD] [--again]

in the order of what they are worth:
  contract    every layer on every family: seen at work, undone, missed where it is not; the kernels of each watched step
  bf16        compiled bf16 through --profile auto: GPT-2 124M and 1.5B, Llama 1.1B and 3B; beside Hugging Face's Trainer and a bare loop
  te-part     FILE...: take over parts of a large wheel, where uploads are limited in size (docs/measurements/README.md)
  te-build    join and install Transformer Engine, build its torch half in the background, try one FP8 product; --dry-run only looks
  fp8         FP8 (Transformer Engine, torchao) against compiled bf16 by width, losses compared; 1.5B and 3B whole
  ablation    attention backends, determinism, allocator; gptoughts bench layers; 20 kills, bit for bit
  kills       the 20 kills alone
  quickstart  the recipes quickstart and gpt-1b as a user starts them
  models      LoRA, diffusion, SmolLM2; a small Llama on GPU and CPU with the same seed
  report      what was measured as Markdown, and the cards that it concerns

Results lie in ${OUT:-out/device}; what lasts from stage to stage in ${DEVICE_WORK:-/tmp/gptoughts-device}. Files that lie in
out/device already, of an earlier run or copied from another machine, are gone on with. --tiny shrinks every model, to try the stages on a CPU.
Wheels in ${WHEELS:-.whl} are installed into ${SITE:-/tmp/site} first, without network.
TEXT
}

case "${1:-}" in
    contract | bf16 | fp8 | ablation | kills | quickstart | models | report | te-part | te-build) stage="$1" ;;
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
export SITE="${SITE:-/tmp/site}" DEVICE_WORK="${DEVICE_WORK:-/tmp/gptoughts-device}" OUT="${OUT:-$PWD/out/device}"
mkdir -p "$OUT" "$DEVICE_WORK/kept"
if compgen -G 'out/device/*.json' >/dev/null; then
    cp --no-clobber out/device/*.json "$DEVICE_WORK/kept/" || true
fi
wheels="${WHEELS:-.whl}"
if compgen -G "$wheels/*.whl" >/dev/null; then
    mark="$SITE/.installed-$(printf '%s\n' "$wheels"/*.whl | sha256sum | cut -c1-16)"
    if [ ! -e "$mark" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$wheels"/*.whl
        touch "$mark"
    fi
fi
export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" - <<'CHECK'
import importlib.util, sys
needed = "torch numpy safetensors tokenizers tiktoken zstandard rich matplotlib click pydantic pynvml transformers accelerate pytest"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"run.sh: not installed for {sys.executable}: {', '.join(missing)}\n  docs/measurements/README.md says how to bring them")
CHECK
case "$stage" in
    te-part) exec "$python" -m tests.device.te part "$@" ;;
    te-build) exec "$python" -m tests.device.te build "$@" ;;
    *) exec "$python" -m tests.device.measure "$stage" "$@" ;;
esac
