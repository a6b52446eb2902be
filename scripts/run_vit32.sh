#!/usr/bin/env bash
# The paper's run: EGA from CLIP ViT-B/32 to resnet8x4 on CIFAR-100, both fetched when they are missing.
# Anything after the script's name goes to train_student.py and wins: bash scripts/run_vit32.sh --epochs 1 --seed 3
set -euo pipefail

clip_mode='ViT-B/32'     # teacher: a published CLIP, or the path of a checkpoint in OpenAI's format
model_s=resnet8x4        # student
feature_dim=256          # dimension of the joint space

r=1                      # weight of the classification loss
a=0                      # weight of KD on the logits
b=1                      # weight of EGA
node_weight=0.8          # weight of node matching in EGA
edge_weight=0.24         # weight of edge matching in EGA

epochs=240
batch_size=64
learning_rate=0.05       # student; the paper takes 0.01 for ShuffleNets and MobileNetV2
learning_rate_t=0.01     # teacher's head; never decayed
lr_decay_epochs=150,180,210
lr_decay_rate=0.1
weight_decay=5e-4
momentum=0.9

seed=0
trial=1                  # a word that tells otherwise equal runs apart

data_dir=./data
clip_root=./CLIP         # published CLIP weights, fetched when they are missing
save_dir=./save

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
set_student_args "$@"
exec "$PYTHON" train_student.py "${STUDENT_ARGS[@]}"
