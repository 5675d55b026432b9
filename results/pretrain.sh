#!/usr/bin/env bash
# The pre-training runs whose logs lie beside this script. From the repository's root, on 2 CPU cores, about 35 minutes:
#   results/pretrain.sh CIFAR PHOTOS     (a CIFAR-10 folder, any folder of photographs)
# Each run ends in runs/; what is kept here is its log.jsonl, curves.png and, for shapes, views.png.
set -euo pipefail
cifar=$1 photos=$2
python simsiam.py                                                   # shapes, seed 0: the recipe was tuned on seed 7
python simsiam.py --experiment fig2-without-stopgrad                # shapes-fig2-without-stopgrad
python simsiam.py "$cifar" --width 1/4 --proj-hidden 512 --dim 512 --pred-dim 128 --batch 64 --base-lr 0.4 --epochs 8 \
    --knn-every 1 --out runs/cifar10-width4
python simsiam.py "$photos" --batch 16 --epochs 1 --out runs/photos-resnet50        # a few steps of the full-size network
