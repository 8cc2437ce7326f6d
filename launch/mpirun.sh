#!/usr/bin/env bash
# One training run in N ranks that mpirun starts, on this machine or on the hosts of a file.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/mpirun.sh N [--hostfile FILE] [RECIPE] [FLAGS]

Starts N ranks with mpirun (Open MPI or MPICH), each running `gptoughts train RECIPE FLAGS`.
Several machines need the checkout and the environment at the same path.

  launch/mpirun.sh 4 shakespeare-char --name first
  launch/mpirun.sh 16 --hostfile hosts gpt-1b --name first
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
command -v mpirun >/dev/null 2>&1 || fail 'mpirun: not found. On Debian and Ubuntu: apt-get install openmpi-bin; on a cluster: module load openmpi'

flags=(-np "$ranks" --bind-to none) # the plan decides about threads and cores
if mpirun --version 2>/dev/null | grep -q 'Open MPI'; then
    flags+=(--oversubscribe) # it counts cores; ranks are counted in GPUs
    [ "$(id -u)" != 0 ] || flags+=(--allow-run-as-root)
fi
if [ "${1:-}" = --hostfile ]; then
    [ $# -gt 1 ] || fail '--hostfile: needs a file'
    flags+=(--hostfile "$2")
    shift 2
fi

enter train
exec mpirun "${flags[@]}" "$PYTHON" -m gptoughts train "$@"
