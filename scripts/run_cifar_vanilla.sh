#!/usr/bin/env bash
# RepDistiller's teachers, one after the other, each from scratch on CIFAR-100 (240 epochs).
# Anything after the script's name goes to train_teacher.py: bash scripts/run_cifar_vanilla.sh --epochs 1
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

"$PYTHON" train_teacher.py --model wrn_40_2 "$@"
"$PYTHON" train_teacher.py --model resnet56 "$@"
"$PYTHON" train_teacher.py --model resnet110 "$@"
"$PYTHON" train_teacher.py --model resnet32x4 "$@"
"$PYTHON" train_teacher.py --model vgg13 "$@"
"$PYTHON" train_teacher.py --model ResNet50 "$@"
