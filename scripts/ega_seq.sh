#!/usr/bin/env bash
# The sequential variant, EGA from CLIP RN101 to resnet8x4 on CIFAR-100: it trains the teacher's head alone, then
# freezes the head and trains the student.
# Anything after the script's name goes to train_student.py and wins. Options that train_teacher.py has too go to both:
# bash scripts/ega_seq.sh --epochs 1 --seed 3
set -euo pipefail

clip_mode='RN101'        # teacher: a published CLIP, or the path of a checkpoint in OpenAI's format
model_s=resnet8x4        # student
feature_dim=256          # dimension of the joint space

r=1                      # weight of the classification loss
a=0                      # weight of KD on the logits
b=1                      # weight of EGA
node_weight=0.8          # weight of node matching in EGA
edge_weight=0.3          # weight of edge matching in EGA

epochs=240               # epochs of the head, and then of the student
batch_size=64
learning_rate=0.05       # student; the paper takes 0.01 for ShuffleNets and MobileNetV2
learning_rate_t=0.01     # teacher's head; decayed like the student's
lr_decay_epochs=150,180,210
lr_decay_rate=0.1
weight_decay=5e-4
momentum=0.9

seed=0
trial=seq                # a word that tells otherwise equal runs apart

data_dir=./data
clip_root=./CLIP         # published CLIP weights, fetched when they are missing
save_dir=./save

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

# The script's arguments that concern the head.
head_args=()
flag=
for argument in "$@"; do
    [[ $argument == -[a-z-]* ]] && flag=${argument%%=*}
    case $flag in
        -h | --help) exec "$PYTHON" train_student.py --help ;;
        --clip_mode) head_args+=("${argument/#--clip_mode/--model}") ;;
        --learning_rate_t) head_args+=("${argument/#--learning_rate_t/--learning_rate}") ;;
        --feature_dim | --dataset | --data_dir | --clip_root | --teacher_views | --save_dir | --trial | --seed | \
            --epochs | --batch_size | --lr_decay_epochs | --lr_decay_rate | --weight_decay | --momentum | \
            --max_steps | --eval_freq | --print_freq | --save_freq | --device | --amp) head_args+=("$argument") ;;
    esac
done
head_args=(
    --model "$clip_mode" --feature_dim "$feature_dim"
    --epochs "$epochs" --batch_size "$batch_size" --learning_rate "$learning_rate_t"
    --lr_decay_epochs "$lr_decay_epochs" --lr_decay_rate "$lr_decay_rate"
    --weight_decay "$weight_decay" --momentum "$momentum"
    --seed "$seed" --trial "$trial"
    --data_dir "$data_dir" --clip_root "$clip_root" --save_dir "$save_dir" ${head_args[@]+"${head_args[@]}"}
)

set_student_args "$@"

# A mistake in the student's options shows here, before the head is trained.
"$PYTHON" -c 'from helper.options import parse_student_options; parse_student_options()' "${STUDENT_ARGS[@]}"

run_script train_teacher.py "${head_args[@]}"
exec "$PYTHON" train_student.py "${STUDENT_ARGS[@]}" --path_t "$RUN"/*_last.pth
