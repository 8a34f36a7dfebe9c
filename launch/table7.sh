#!/usr/bin/env bash
# Paper 2, table 7, as benchmarks of one device: seconds per step (GN 6x 0.578, SyncBN 0.483 in the
# paper, on 8 GPUs), inference images per second, and what loading the data takes. One JSON object a
# line. Not run yet on a GPU.
#   bash launch/table7.sh > table7.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
step() { python tools/benchmark.py step "$@"; }
step configs/r50_imagenet.yaml phases.train.start_from.source=random phases.train.start_from.cost=null phases.train.norm_mode=live phases.train.freeze_stages=0
step configs/r50_syncbn_scratch.yaml phases.train.norm_mode=live
step configs/r50_gn_scratch.yaml
step configs/r50_direct.yaml --phase pretrain
step configs/r50_direct.yaml --phase finetune
python tools/benchmark.py predict configs/r50_direct.yaml --phase finetune
python tools/benchmark.py predict configs/r50_gn_scratch.yaml
python tools/benchmark.py stream configs/r50_direct.yaml --phase pretrain
python tools/benchmark.py stream configs/r50_direct.yaml --phase finetune
