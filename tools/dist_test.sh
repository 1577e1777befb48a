#!/usr/bin/env bash
# One process per GPU (or CPU share):
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTIONS of tools/test.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each, see docs/distributed.md.
# PYTHON: another one than that of the environment in use or of .venv.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [OPTIONS of tools/test.py]" >&2
    exit 2
fi
if ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS must be a whole number of at least 1, got '$3'." >&2
    exit 2
fi
python=${PYTHON:-}
if [ -z "$python" ]; then
    # Without links in its path, by which Python would look for its packages.
    python=$(cd -P "$(dirname "$0")/.." && pwd)/.venv/bin/python
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! [ -x "$python" ]; then python=python; fi
fi
"$python" -m torch.distributed.run --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" \
    --nproc-per-node="$3" \
    -- "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}" || {
    status=$?
    echo "error: a process of the job failed, see above." >&2
    exit $status
}
