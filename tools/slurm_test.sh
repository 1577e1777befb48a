#!/usr/bin/env bash
# A Slurm job:  tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [OPTIONS of tools/test.py]
# Set GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS for another job than 8 GPUs of one node with 5
# CPUs each, PYTHON for another Python than the first on the path.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [OPTIONS of tools/test.py]" >&2
    exit 2
fi
# shellcheck disable=SC2086  # several arguments in one variable, as Slurm's users know it
srun -p "$1" --job-name="$2" --gres=gpu:"${GPUS_PER_NODE:-8}" --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$3" "$4" --launcher slurm "${@:5}"
