#!/usr/bin/env bash
# Measure EGA on real images: every method on CIFAR-100, from an encoder that knows more than its student.
# EfficientNet-Lite2 was trained with ImageNet's labels; it stands in for CLIP. The paper's protocol is shortened.
# The script runs what is missing, goes on with interrupted runs and skips finished ones. It keeps the two small files
# of each finished run in docs/runs/. The words after the script's name say which parts to run:
# bash scripts/run_real_teacher.sh methods
set -euo pipefail

teacher=timm:tf_efficientnet_lite2
teacher_resolution=160   # a bank of one view is affordable on a CPU at this size
model_s=resnet20
epochs=30
lr_decay_epochs=19,22,26 # the same shares of the epochs as 150, 180, 210 of 240
select_epochs=6          # epochs of runs on nine tenths of the training set; the held-out tenth judges them
select_decay=4,5
large_epochs=24          # epochs of the larger student: a tenth of the paper's, exactly
large_decay=15,18,21
methods='none ega kd crd irg ccl nce rkd pkt hint'
candidates_hint='1 100'  # weights of distillation (-b) to choose from: 1, and RepDistiller's
candidates_pkt='1 30000'
candidates_crd='1 0.8'
tried=(                  # options that show why a method is where it is
    'none' 'ega' 'ega -b 2' 'ega -b 0.5' 'ega -b 0.25' 'ega -b 0.1' 'ega -node 0' 'ega --joint teacher'
    'nce' 'nce -b 4' 'nce -b 2' 'nce -b 0.5' 'nce --joint teacher' 'ccl' 'ccl -b 2' 'ccl -b 0.5'
    'none --batch_size 32' 'ega --batch_size 32' 'ega --batch_size 32 -b 0.5' 'nce --batch_size 32'
)
tuned='ega nce ccl'      # methods that train once more with the best weight that was tried
rivals=                  # two methods that are repeated with EGA; if empty, the best two of the first seed
seeds='1 2'              # seeds of the repeated runs
save_dir=./save
records=docs/runs        # folder of the records of finished runs
parts=${*:-methods why tuned large seeds views labels}

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
bash scripts/fetch_lite.sh 2 >&2
encoder=$teacher=CLIP/${teacher#timm:}.pth
common=(--teacher_resolution "$teacher_resolution" --teacher_views 1 --save_dir "$save_dir")
select=(--holdout 0.1 --epochs "$select_epochs" --lr_decay_epochs "$select_decay")

# train GROUP NAME OPTION...: the run GROUP_NAME, unless $records has it; its record becomes $records/GROUP/NAME.
train() {
    local group=$1 name=$2 run=$save_dir/student_model/$1_$2
    shift 2
    [[ -e $records/$group/$name/metrics.jsonl ]] && { echo "$records/$group/$name: done"; return; }
    "$PYTHON" train_student.py --name "${group}_$name" --clip_mode "$encoder" "${common[@]}" --epochs "$epochs" \
        --lr_decay_epochs "$lr_decay_epochs" --model_s "$model_s" "$@"
    mkdir -p "$records/$group/$name"
    cp "$run"/{options.json,metrics.jsonl} "$records/$group/$name"
}

# word OPTION...: a method and its options as one word: ega -b 0.5 is ega_b0.5, ega --batch_size 32 is ega_at32.
word() { sed -E 's/ --batch_size /_at/; s/ --?/_/g; s/ //g' <<< "$*"; }

# weight METHOD: sets WEIGHT to the method's options; the hold-out set chooses them where there is a choice.
weight() {
    local candidates=candidates_$1 b
    WEIGHT=()
    [[ -z ${!candidates:-} ]] && return
    for b in ${!candidates}; do
        train select "$1_b$b" --distill "$1" -b "$b" "${select[@]}"
    done
    WEIGHT=(-b "$("$PYTHON" -m report --choose beta "$records"/select/"$1"_b*)")
}

# method METHOD [SEED]
method() {
    weight "$1"
    train methods "$1${2:+_seed$2}" --distill "$1" "${WEIGHT[@]}" ${2:+--seed "$2"}
}

report() { "$PYTHON" -m report --against ega "$@"; }

for part in $parts; do
    case $part in
    methods)             # table 1, one seed
        for name in $methods; do method "$name"; done
        for options in 'ega -edge 0' 'ega -node 0'; do train methods "$(word "$options")" --distill $options; done
        report "$records"/methods/*
        ;;
    why)                 # weights, terms, spaces, batches; the teacher's head trained first
        for options in "${tried[@]}"; do train why "$(word "$options")" --distill $options "${select[@]}"; done
        if [[ ! -e $records/why/ega_headfirst ]]; then
            "$PYTHON" train_teacher.py --name why_head --model "$encoder" "${common[@]}" --learning_rate 0.01 \
                "${select[@]}"
            train why ega_headfirst --distill ega --path_t "$save_dir"/models/why_head/*_best.pth "${select[@]}"
        fi
        "$PYTHON" -m report "$records"/why/*
        ;;
    tuned)               # table 1's first methods once more, with the weight that is best on the hold-out
        for name in $tuned; do
            found=("$records/why/$name" "$records/why/$name"_b*)
            b=$(printf %g "$("$PYTHON" -m report --choose beta "${found[@]}")")
            [[ $b == 1 ]] || train methods "${name}_b$b" --distill "$name" -b "$b"
        done
        report "$records"/methods/*
        ;;
    large)               # a larger student
        for name in none kd ega; do
            train large "$name" --distill "$name" --model_s resnet8x4 --epochs "$large_epochs" --lr_decay_epochs "$large_decay"
        done
        report "$records"/large/*
        ;;
    seeds)               # table 1's main rows with three seeds
        [[ -n $rivals ]] || rivals=$("$PYTHON" -m report --best 2 --except "none kd ega" "$records"/methods/*)
        for seed in $seeds; do
            for name in none kd ega $rivals; do method "$name" "$seed"; done
        done
        report "$records"/methods/*
        ;;
    views)               # does a bank of few views cost accuracy?
        for n in 2 4 8; do train views "views$n" --distill ega --teacher_views "$n"; done
        for n in 1 8; do train views "shared$n" --distill ega --teacher_views "$n" --views shared; done
        method ega           # one view, as in table 1
        report "$records"/methods/ega "$records"/views/*
        ;;
    labels)              # few labels; all images are distilled
        for share in 0.01 0.1 1; do
            for name in none kd ega; do
                train labels "${name}_labels$share" --distill "$name" --labels "$share" --epochs 20 \
                    --lr_decay_epochs 13,15,18
            done
        done
        # Without a teacher an epoch of few labels has few steps: it is also run with ten times as many epochs.
        train labels none_labels0.01_long --distill none --labels 0.01 --epochs 200 --lr_decay_epochs 130,150,180 \
            --eval_freq 10
        report "$records"/labels/{none,kd,ega}_labels1 "$records"/labels/*_labels0.1 "$records"/labels/*_labels0.01*
        ;;
    *)
        echo "no such part: $part (methods why tuned large seeds views labels)" >&2
        exit 2
        ;;
    esac
done
