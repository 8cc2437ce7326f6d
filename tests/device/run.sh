#!/usr/bin/env bash
# GPU-only checks in stages of at most 8 minutes. Each writes JSON after every measurement and skips finished ones.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/device/run.sh STAGE [--tiny] [--seconds N] [--only WORD] [--again]

stages, by priority:
  contract    every layer on every family: active, undone, detected as missing without it; the kernels of each watched step
  bf16        compiled bf16 through --profile auto: GPT-2 124M and 1.5B, Llama 1.1B and 3B; compared with Hugging Face's Trainer and a plain loop
  te-part     FILE...: store parts of a large wheel, for uploads of limited size (docs/measurements/README.md)
  te-build    join and install Transformer Engine, build its torch part in the background, run one FP8 product; --dry-run only checks
  fp8         FP8 (Transformer Engine, torchao) against compiled bf16 by width, losses compared; full 1.5B and 3B models
  ablation    attention backends, determinism, allocator; gptoughts bench layers; 20 kills, bit for bit
  sharding    FSDP2 and ZeRO-3 as one rank with host memory: Llama 1.1B beside a plain run, and a full step of 8B in 24 GB
  kills       only the 20 kills
  quickstart  the recipes quickstart and gpt-1b, started as users do
  models      LoRA, diffusion, SmolLM2; a small Llama on GPU and CPU with the same seed
  report      results as Markdown, and the layer cards to update

Results: ${OUT:-out/device}; files shared between stages: ${DEVICE_WORK:-/tmp/gptoughts-device}. Existing files in out/device, of an earlier
run or copied from another machine, are continued. --tiny shrinks every model, to try the stages on a CPU. Wheels in ${WHEELS:-.whl} are
installed into ${SITE:-/tmp/site} first, without network.
TEXT
}

case "${1:-}" in
    contract | bf16 | fp8 | ablation | sharding | kills | quickstart | models | report | te-part | te-build) stage="$1" ;;
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
    sys.exit(f"run.sh: not installed for {sys.executable}: {', '.join(missing)}\n  Try: docs/measurements/README.md, section A machine without network")
CHECK
case "$stage" in
    te-part) exec "$python" -m tests.device.te part "$@" ;;
    te-build) exec "$python" -m tests.device.te build "$@" ;;
    *) exec "$python" -m tests.device.measure "$stage" "$@" ;;
esac
