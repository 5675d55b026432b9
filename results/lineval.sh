#!/usr/bin/env bash
# The linear evaluations whose results lie beside this script. From the repository's root, on 2 CPU cores, about 45 minutes:
#   results/lineval.sh CIFAR     (a CIFAR-10 folder; and runs/shapes from `python simsiam.py`)
# Each ends in runs/; what is kept here is its lineval.json and, where the layer was trained, its log.jsonl.
set -euo pipefail
cifar=$1 backbone=results/cifar10-width4/backbone.pth
python lineval.py --ckpt runs/shapes/checkpoint.pth
python lineval.py --ckpt random:resnet18                            # the same for an untrained network
python lineval.py "$cifar" --ckpt "$backbone" --cached --out runs/cifar10-width4-cached
python lineval.py "$cifar" --ckpt random:resnet18 --width 1/4 --cached --out runs/cifar10-width4-untrained-cached
python lineval.py "$cifar" --ckpt "$backbone" --knn --out runs/cifar10-width4-knn
python lineval.py "$cifar" --ckpt "$backbone" --sgd --epochs 50 --out runs/cifar10-width4-sgd      # half of the protocol's length
python lineval.py "$cifar" --ckpt "$backbone" --lars --epochs 45 --out runs/cifar10-width4-lars    # likewise
