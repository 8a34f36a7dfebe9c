#!/usr/bin/env bash
# From a fresh machine to a trained, evaluated detector of synthetic shapes, in minutes:
#   bash launch/quickstart.sh
# Makes .venv, installs bigdet, makes shards, trains both phases of configs/quickstart.yaml, evaluates,
# draws detections, writes a report. PYTHON chooses the interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."

[ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
pip install --quiet --constraint launch/constraints.txt --editable .

for split in train val; do
  [ -f "data/shapes/$split/manifest.json" ] ||
    bigdet shards shapes --split "$split" --out "data/shapes/$split"
done

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ranks=$(python -c 'import torch; print(min(2, torch.cuda.device_count()) or 2)')
# An evaluation that is not scored yet is scored by the next start.
{ [ -f runs/quickstart/model.safetensors ] &&
  ! compgen -G "runs/quickstart/evaluation/*.detections" > /dev/null; } ||
  deepspeed --num_gpus "$ranks" -m bigdet.train configs/quickstart.yaml

bigdet evaluate runs/quickstart --shards data/shapes/val
bigdet report runs/quickstart --out runs/quickstart/report
echo
echo "Pictures with detections:"
ls runs/quickstart/pictures/*.jpg
echo
echo "Plots, numbers and pictures, for a browser: runs/quickstart/report/report.html"
echo
echo "Your own data (COCO format), then training on it:"
echo "  bigdet shards coco --images IMAGES --annotations FILE.json --out data/mine/train"
echo "  deepspeed --num_gpus $ranks -m bigdet.train configs/swin_t_direct.yaml \\"
echo "    data.train.shards=data/mine/train data.val.shards=data/mine/val output=runs/mine"
