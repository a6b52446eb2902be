#!/usr/bin/env bash
# Train your own CLIP on CIFAR-100, and distil it into resnet8x4 under the paper's schedule: its linear head, banks of
# 1, 16 and all 162 views, the paper's methods and its two ablations.
# The script runs what is missing, goes on with interrupted runs and skips finished ones; it needs a GPU
# (docs/results.md).
# Anything after the script's name goes to every run but the pre-training: bash scripts/run_own_clip.sh --epochs 2
set -euo pipefail

vision_layers=2,2,2,2    # OpenAI's ResNet; see pretrain_clip.py --help
vision_width=64
embed_dim=512
text_layers=4
text_width=256
clip_epochs=60
clip_batch_size=512

model_s=resnet8x4
views='1 16 all'         # banks to compare, under EGA
methods='none kd nce ccl crd irg ega'
seeds='0'
trial=1
save_dir=./save

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
run_script pretrain_clip.py --dataset cifar100 --vision_layers "$vision_layers" --vision_width "$vision_width" \
    --embed_dim "$embed_dim" --text_layers "$text_layers" --text_width "$text_width" \
    --epochs "$clip_epochs" --batch_size "$clip_batch_size" --save_dir "$save_dir"
clip=$RUN
"$PYTHON" train_teacher.py --model "$clip" --save_dir "$save_dir" "$@"

runs=() banks=()
train() {
    run_script train_student.py --clip_mode "$clip" --model_s "$model_s" --trial "$trial" --save_dir "$save_dir" "$@"
}

for seed in $seeds; do
    for n in $views; do
        train --distill ega --teacher_views "$n" --seed "$seed" "$@"
        banks+=("$RUN")
    done
    for method in $methods; do
        train --distill "$method" --seed "$seed" "$@"
        runs+=("$RUN")
    done
    for term in -node -edge; do  # edges alone, nodes alone
        train --distill ega "$term" 0 --seed "$seed" "$@"
        runs+=("$RUN")
    done
done
"$PYTHON" -m report "${banks[@]}"
"$PYTHON" -m report "${runs[@]}"
"$PYTHON" -m report.curves "${runs[@]}" --out "$save_dir/own_clip.png"
