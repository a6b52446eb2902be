#!/usr/bin/env bash
# RepDistiller's column resnet32x4 -> resnet8x4 on CIFAR-100: the teacher, the student alone, its methods, and EGA with
# weights that a hold-out set chooses. The script runs what is missing, goes on with interrupted runs and skips finished
# ones. It prints the table beside the published numbers, and draws the curves. Three seeds make 33 runs: the teacher,
# 27 of 240 epochs each, and five shorter ones that choose.
# Anything after the script's name goes to every run, for trials: bash scripts/run_repdistiller_table.sh --epochs 2
set -euo pipefail

model_t=resnet32x4
model_s=resnet8x4
methods='kd crd ega pkt rkd hint attention similarity'
seeds='0 1 2'            # every method runs with the first before the next begins
ega_weights='0.25 0.5 1 2 4'    # EGA's -b, compared on a tenth of the training set with seed 0
select_epochs=60         # epochs of each of these runs; the schedule is a quarter of the whole one
select_decay=38,45,53
trial=1
save_dir=./save

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
train() { run_script train_student.py --model_s "$model_s" --trial "$trial" --save_dir "$save_dir" "$@"; }

run_script train_teacher.py --model "$model_t" --save_dir "$save_dir" "$@"
path_t=$RUN/${model_t}_last.pth

b=
choose_ega_weight() {
    [[ -n $b ]] && return
    local tried=()
    for weight in $ega_weights; do
        train --distill ega --path_t "$path_t" -b "$weight" --holdout 0.1 --trial select \
            --epochs "$select_epochs" --lr_decay_epochs "$select_decay" "$@"
        tried+=("$RUN")
    done
    b=$("$PYTHON" -m report --choose beta "${tried[@]}")
    echo "EGA's weight, chosen on the hold-out set: $b"
}

runs=()
for seed in $seeds; do
    train --distill none --clip_tn 0 --seed "$seed" "$@"
    runs+=("$RUN")
    for method in $methods; do
        weights=()
        if [[ $method == ega ]]; then
            choose_ega_weight "$@"
            weights=(-b "$b")
        fi
        train --distill "$method" --path_t "$path_t" --seed "$seed" "${weights[@]}" "$@"
        runs+=("$RUN")
    done
    [[ -n ${first:-} ]] || first=("${runs[@]}")
    "$PYTHON" -m report "${runs[@]}"
done
"$PYTHON" -m report.curves --out "$save_dir/repdistiller_table.png" "${first[@]}"
