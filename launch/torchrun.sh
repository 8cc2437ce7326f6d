#!/usr/bin/env bash
# One training run on N GPUs of this machine, or in N CPU processes without GPUs.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/torchrun.sh N [RECIPE] [FLAGS]

Starts N ranks on this machine with torchrun, each running `gptoughts train RECIPE FLAGS`.

If a rank runs out of memory, a smaller micro-batch is saved and all ranks exit. A run with a name is then restarted, at most 5 times, and
resumes from its last checkpoint.

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
    # torchrun would set 1 for every rank, and a variable that is set overrides the plan.
    cores="$("$PYTHON" -c 'from gptoughts.hardware.machine import probe; m = probe(); print(m.cpu.usable_cores, 8 if m.gpus else 10**6)')"
    share=$((${cores% *} / ranks))
    most="${cores#* }"
    [ "$share" -le "$most" ] || share="$most"
    [ "$share" -ge 1 ] || share=1
    export OMP_NUM_THREADS="$share"
fi

# torchrun exits with code 1 for every failure of a rank, so a rank that runs out of memory writes into this file.
GPTOUGHTS_SHORTAGE="$(mktemp)"
export GPTOUGHTS_SHORTAGE
trap 'rm -f "$GPTOUGHTS_SHORTAGE"' EXIT
for again in 5 4 3 2 1 0; do
    code=0
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m gptoughts -- train "$@" || code=$?
    if [ "$code" -eq 0 ] || [ ! -s "$GPTOUGHTS_SHORTAGE" ] || [ "$again" -eq 0 ]; then
        exit "$code"
    fi
    case " $* " in
        *' --run'*) ;;
        *) exit "$code" ;; # a run without a name would start over
    esac
    : >"$GPTOUGHTS_SHORTAGE"
    echo 'launch/torchrun.sh: out of memory; restarting with the smaller micro-batch' >&2
done
