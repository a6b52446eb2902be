#!/usr/bin/env bash
# The whole job on the embedded default data set, in some six minutes on two cores. It pre-trains a small CLIP on many
# captioned images, distils it into a student that sees few labelled images, compares, draws the pictures and exports.
# Anything after the script's name goes to train_student.py and wins: bash scripts/run_demo.sh --seed 1
set -euo pipefail

clip_epochs=2            # epochs of pre-training on 50 000 captioned images

model_s=resnet8          # student
epochs=160               # epochs on 500 labelled images
batch_size=32
lr_decay_epochs=100,120,140
eval_freq=20

save_dir=./save/demo

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

run_script pretrain_clip.py --dataset shapes --epochs "$clip_epochs" --save_dir "$save_dir"
clip_mode=$RUN

runs=()
for distill in none kd ega; do
    run_script train_student.py --dataset shapes --distill "$distill" --clip_mode "$clip_mode" --model_s "$model_s" \
        --epochs "$epochs" --batch_size "$batch_size" --lr_decay_epochs "$lr_decay_epochs" --eval_freq "$eval_freq" \
        --save_dir "$save_dir" "$@"
    runs+=("$RUN")
done

echo
"$PYTHON" -m report "${runs[@]}"
echo
echo "pictures:"
"$PYTHON" -m report.curves "${runs[@]}"
"$PYTHON" -m report.curves --embedding "${runs[0]}" "${runs[2]}"
echo

# Export the last run's student, EGA's, as ONNX, and classify a picture that it was not trained on.
"$PYTHON" export.py "${runs[2]}" --force
picture="$save_dir/striped star.png"
"$PYTHON" - "$picture" <<'EOF'
import sys

from torchvision.io import write_png

from dataset import load_dataset

shapes = load_dataset("shapes", "")
star = shapes.test.targets.tolist().index(shapes.classes.index("striped star"))
write_png(shapes.test.images[star], sys.argv[1])
EOF
"$PYTHON" export.py "${runs[2]}" --predict "$picture"
