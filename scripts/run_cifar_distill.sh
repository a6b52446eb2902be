#!/usr/bin/env bash
# RepDistiller's distillation runs on CIFAR-100 from a CNN teacher, one after the other, with its weights; then the
# methods that it lacks. Finished runs are skipped, so that the script can be stopped and started again.
# Anything after the script's name goes to train_student.py: bash scripts/run_cifar_distill.sh --epochs 1
set -euo pipefail

# The teacher comes from run_cifar_vanilla.sh, or is one of RepDistiller's published files in a folder of their name.
path_t=(./save/models/resnet32x4_cifar100_seed0_trial1_*/resnet32x4_last.pth)
model_s=resnet8x4
trial=1

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

distil() { "$PYTHON" train_student.py --path_t "${path_t[0]}" --model_s "$model_s" --trial "$trial" "$@"; }

distil --distill kd -r 0.1 -a 0.9 -b 0 "$@"
distil --distill hint -a 0 -b 100 "$@"            # FitNet
distil --distill attention -a 0 -b 1000 "$@"      # AT
distil --distill similarity -a 0 -b 3000 "$@"     # SP
distil --distill correlation -a 0 -b 0.02 "$@"    # CC
distil --distill vid -a 0 -b 1 "$@"               # VID
distil --distill rkd -a 0 -b 1 "$@"               # RKD
distil --distill pkt -a 0 -b 30000 "$@"           # PKT
distil --distill abound -a 0 -b 1 "$@"            # AB
distil --distill factor -a 0 -b 200 "$@"          # FT
distil --distill fsp -a 0 -b 50 "$@"              # FSP
distil --distill nst -a 0 -b 50 "$@"              # NST
distil --distill crd -a 0 -b 0.8 "$@"             # CRD
distil --distill crd -a 1 -b 0.8 "$@"             # CRD + KD

for method in kdsvd nce ccl irg ega dkd dist reviewkd ofd simkd pefd itrd mlld nd ofa clipkd unic vkd rrd nkd ttm wttm \
        srd rld wkd wkd_feature abkd skd cka; do
    distil --distill "$method" "$@"
done
