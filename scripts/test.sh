#!/bin/sh
# Set up .venv and run lint and the tests. `--slow` adds the long sweeps; other arguments go to pytest.
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
sh scripts/setup.sh requirements-dev.txt
slow='not slow and not gpu'
if [ "${1:-}" = --slow ]; then
    slow='not gpu'
    shift
fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check .
[ $# -eq 0 ] || exec .venv/bin/python -m pytest -q -m "$slow" "$@"
.venv/bin/python -m pytest -q -n 2 --dist loadfile -m "($slow) and not fault"
# These fork children, which is only safe from a process without threads: no workers. A fork that never came to life (it has
# said nothing when its time is up) is tried once more.
.venv/bin/python -m pytest -q -m "($slow) and fault" --reruns 1 --only-rerun "still running after"
