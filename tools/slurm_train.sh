#!/usr/bin/env bash
# A Slurm job:  tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS of tools/train.py]
# Set GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS for another job than 8 GPUs of one node with 5
# CPUs each, PYTHON for another Python than the first on the path.
# REQUEUE=1, in a batch job (sbatch --signal=USR1@120 --wrap 'REQUEUE=1 tools/slurm_train.sh ...'): a
# job that SIGTERM, SIGUSR1 or one of --signals has ended is requeued, and goes on from its newest
# checkpoint.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [OPTIONS of tools/train.py]" >&2
    exit 2
fi
resume=
if [ -n "${REQUEUE:-}" ]; then
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        echo "error: REQUEUE needs a batch job: sbatch --signal=USR1@120 --wrap 'REQUEUE=1 $0 ...'" >&2
        exit 2
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then resume=--resume; fi
    # shellcheck source=tools/signals.sh
    source "$(dirname "$0")/signals.sh" "${@:5}"
    # srun's processes get them, too, and end with status 75; train.py refuses other names
    trap : "${signals[@]}" || true
fi
status=0
# shellcheck disable=SC2086  # several arguments in one variable, as Slurm's users know it
srun -p "$1" --job-name="$2" --gres=gpu:"${GPUS_PER_NODE:-8}" --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}" \
    $resume || status=$?
if [ -n "${REQUEUE:-}" ] && [ "$status" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
