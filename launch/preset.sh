# Sourced by the presets train_*.sh, after environment.sh: reads their arguments and runs or shows `gptoughts train`.
# `read_arguments "$@"` sets RECIPE (may be empty) and FLAGS; `gptoughts train ...` runs, or with --dry-run prints plan and command.
# shellcheck shell=bash

RECIPE='' FLAGS=() PLAN_FLAGS=() MACHINE='' RANKS='' DRY_RUN=''

OPTIONS="
  --dry-run        print the plan and the command, train nothing
  --machine FILE   with --dry-run: plan for another machine (written by gptoughts doctor --machine-json)

All other arguments go to gptoughts train."

read_arguments() {
    while [ $# -gt 0 ]; do
        case "$1" in
            -h | --help)
                usage
                printf '%s\n' "$OPTIONS"
                exit 0
                ;;
            --dry-run) DRY_RUN=yes ;;
            --machine=*) MACHINE="${1#*=}" ;;
            --machine)
                [ $# -gt 1 ] || fail '--machine: needs a file'
                MACHINE="$2"
                shift
                ;;
            --strict) FLAGS+=("$1") ;; # this and the next two: of train, not of plan
            --name=* | --run=* | --run-dir=* | --resume=* | --numerics=*) FLAGS+=("$1") ;;
            --name | --run | --run-dir | --resume | --numerics)
                FLAGS+=("$1" "${@:2:1}")
                [ $# -eq 1 ] || shift
                ;;
            --ranks=* | --gpus=*) FLAGS+=("$1") RANKS="${1#*=}" ;;
            --ranks | --gpus)
                FLAGS+=("$1" "${@:2:1}") RANKS="${2:-}"
                [ $# -eq 1 ] || shift
                ;;
            -*) FLAGS+=("$1") PLAN_FLAGS+=("$1") ;;
            *)
                if [ -z "$RECIPE" ] && [ "${#FLAGS[@]}" -eq 0 ]; then
                    RECIPE="$1"
                else
                    FLAGS+=("$1") PLAN_FLAGS+=("$1")
                fi
                ;;
        esac
        shift
    done
    [ -z "$MACHINE" ] || [ -n "$DRY_RUN" ] || fail "--machine $MACHINE: only with --dry-run; training uses this machine"
}

count_gpus() { # [MACHINE]: prints the number of GPUs; nothing if the file cannot be read, which plan reports
    "$PYTHON" - "$@" 2>/dev/null <<'PY' || true
import sys
from gptoughts.hardware.machine import probe, read
print(len((read(sys.argv[1]) if sys.argv[1:] else probe()).gpus) or 1)
PY
}

gptoughts() { # train WORDS: the words of the preset, then FLAGS
    enter train
    if [ -z "$DRY_RUN" ]; then
        exec "$PYTHON" -m gptoughts "$@" "${FLAGS[@]}"
    fi
    local plan=("${@:2}" "${PLAN_FLAGS[@]}") ranks
    if [ -n "$MACHINE" ]; then
        plan+=(--machine "$MACHINE")
    fi
    ranks="${RANKS:-$(count_gpus ${MACHINE:+"$MACHINE"})}"
    if [ -n "$ranks" ]; then
        plan+=(--ranks "$ranks")
    fi
    "$PYTHON" -m gptoughts plan "${plan[@]}"
    printf 'command     gptoughts'
    printf ' %q' "$@" "${FLAGS[@]}"
    printf '\n'
}
