#!/usr/bin/env bash
# One training run on N GPUs of this machine, or on N processes where there is none.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/torchrun.sh N [RECIPE] [FLAGS]

Starts N ranks on this machine with torchrun, each running `gptoughts train RECIPE FLAGS`.

  launch/torchrun.sh 8 gpt-1b --run first
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
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    # torchrun would set 1 for everybody, and a variable that is set wins over the plan.
    cores="$("$PYTHON" -c 'from gptoughts.machine import probe; m = probe(); print(m.cpu.usable_cores, 8 if m.gpus else 10**6)')"
    share=$((${cores% *} / ranks))
    most="${cores#* }"
    [ "$share" -le "$most" ] || share="$most"
    [ "$share" -ge 1 ] || share=1
    export OMP_NUM_THREADS="$share"
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m gptoughts -- train "$@"
