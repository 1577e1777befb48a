#!/usr/bin/env bash
# One process per GPU (or CPU share):
#   tools/dist_train.sh CONFIG GPUS [OPTIONS of tools/train.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each, see docs/distributed.md.
# MAX_RESTARTS: how often the job is started again, from its newest checkpoint, when a process dies.
# SIGTERM, SIGUSR1 and those of --signals end it with a checkpoint and status 75.
# PYTHON: another one than that of the environment in use or of .venv.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [OPTIONS of tools/train.py]" >&2
    exit 2
fi
if ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS must be a whole number of at least 1, got '$2'." >&2
    exit 2
fi
# shellcheck source=tools/signals.sh
source "$(dirname "$0")/signals.sh" "${@:3}"
python=${PYTHON:-}
if [ -z "$python" ]; then
    # Without links in its path, by which Python would look for its packages.
    python=$(cd -P "$(dirname "$0")/.." && pwd)/.venv/bin/python
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! [ -x "$python" ]; then python=python; fi
fi
address=${MASTER_ADDR:-127.0.0.1} port=${PORT:-29500}
if [ "${MAX_RESTARTS:-0}" != 0 ]; then
    # PyTorch's processes would otherwise find the addresses of those that have died.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    meeting=(--max-restarts="$MAX_RESTARTS" --rdzv-backend=c10d --rdzv-endpoint="$address:$port")
else
    meeting=(--node-rank="${NODE_RANK:-0}" --master-addr="$address" --master-port="$port")
fi
# Without -- older versions of Python take --signals for an abbreviation of an option of torchrun.
"$python" -m torch.distributed.run --nnodes="${NNODES:-1}" "${meeting[@]}" --nproc-per-node="$2" \
    -- "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}" &
job=$!
preempted=
trap : INT # which torchrun gets, too
# torchrun knows SIGTERM only; it passes it on, and kills what is left after 30 seconds.
trap 'preempted=1; kill -TERM "$job"' "${signals[@]}" || true # train.py refuses other names
status=0
wait "$job" || status=$?
while kill -0 "$job" 2>/dev/null; do # a signal has ended the wait
    status=0
    wait "$job" || status=$?
done
if [ "$status" != 0 ] && [ -n "$preempted" ]; then exit 75; fi # as tools/train.py does
if [ "$status" != 0 ]; then
    echo "error: a process of the job failed, see above; --resume goes on from a checkpoint." >&2
fi
exit "$status"
