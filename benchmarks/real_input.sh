#!/usr/bin/env bash
# Train the real configs for a few iterations on a few real images and test what they saved:
#   benchmarks/real_input.sh COCO_ROOT ADE_ROOT [WORK_DIR]
# COCO_ROOT and ADE_ROOT have the layouts of COCO 2017 and ADEChallengeData2016. On a CPU.
#
# The recipes, 1333x800 and 512x512 crops with batch 2, are untouched but for the warm-up: at
# 500 or 1500 iterations it would keep the learning rate near zero to the end of such a run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
coco=$1 ade=$2 work=${3:-work_dirs/real_input}
log='default_hooks.logger.interval=1'

for name in mask_rcnn retinanet; do
    $python tools/train.py configs/$name/cf_s_1x.py --data-root "$coco" --work-dir "$work/$name" \
        --cfg-options $log train_cfg.max_epochs=1 param_scheduler.0.end=5 randomness.seed=0
    $python tools/test.py configs/$name/cf_s_1x.py "$work/$name/epoch_1.pth" \
        --data-root "$coco" --work-dir "$work/$name"
done
$python tools/train.py configs/upernet/cf_s_160k.py --data-root "$ade" --work-dir "$work/upernet" \
    --cfg-options $log train_cfg.max_iters=30 train_cfg.val_interval=30 \
    default_hooks.checkpoint.interval=30 param_scheduler.0.end=5 param_scheduler.1.begin=5 \
    param_scheduler.1.end=30 randomness.seed=0 train_dataloader.num_workers=1 \
    val_dataloader.num_workers=1 test_dataloader.num_workers=1
$python tools/test.py configs/upernet/cf_s_160k.py "$work/upernet/iter_30.pth" \
    --data-root "$ade" --work-dir "$work/upernet"
$python benchmarks/real_input_table.py "$work" > "$work/table.md"
cat "$work/table.md"
