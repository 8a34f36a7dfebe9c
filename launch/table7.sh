#!/usr/bin/env bash
# Paper 2, table 7: seconds per step on one device (in the paper, on 8 GPUs: GN 0.578, SyncBN 0.483),
# its memory, inference images per second, and what loading the data takes. One JSON object per line.
# All rows have the 4conv1fc box head (the paper's ImageNet and direct columns are equal in time), and
# SyncBN is in the backbone only.
# Words after it change options of all rows. Not run yet on a GPU.
#   bash launch/table7.sh > table7.jsonl
#   bash launch/table7.sh model.backbone=resnet18 data.train.shards=DIR data.val.shards=DIR
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
row() {  # the name of a row, then the command that prints it
  local name=$1
  shift
  "$@" | sed "s/^{/{\"row\": \"$name\", /"
}
steps=(python -m bigdet.plan --measure)
row imagenet "${steps[@]}" configs/r50_imagenet.yaml model.box_head=4conv1fc "$@"
row scratch_bn "${steps[@]}" configs/r50_imagenet.yaml model.box_head=4conv1fc phases.train.start_from.source=random phases.train.start_from.cost=null phases.train.norm_mode=live phases.train.freeze_stages=0 "$@"
row scratch_syncbn "${steps[@]}" configs/r50_syncbn_scratch.yaml model.norm_scope=backbone "$@"
row scratch_gn "${steps[@]}" configs/r50_gn_scratch.yaml "$@"
row direct_pretrain "${steps[@]}" --phase pretrain configs/r50_direct.yaml "$@"
row direct_finetune "${steps[@]}" --phase finetune configs/r50_direct.yaml "$@"
row imagenet_inference python tools/benchmark.py predict configs/r50_imagenet.yaml model.box_head=4conv1fc "$@"
row direct_inference python tools/benchmark.py predict --phase finetune configs/r50_direct.yaml "$@"
row gn_inference python tools/benchmark.py predict configs/r50_gn_scratch.yaml "$@"
row pretrain_data python tools/benchmark.py stream --phase pretrain configs/r50_direct.yaml "$@"
row finetune_data python tools/benchmark.py stream --phase finetune configs/r50_direct.yaml "$@"
