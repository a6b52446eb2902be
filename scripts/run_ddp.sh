#!/usr/bin/env bash
# The paper's run over several processes: one for each GPU, or two that share the cores of a machine without a GPU.
# Anything after the script's name goes to train_student.py and wins: bash scripts/run_ddp.sh --epochs 1 --sync_bn
# On several machines, call torchrun with its --nnodes and --rdzv_endpoint instead of --standalone.
set -euo pipefail

processes=auto           # auto: as many as there are GPUs, or 2
batch_size=64            # samples of all processes together
threads=auto             # threads of each process; auto: its share of the cores

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
if [[ $processes == auto ]]; then
    processes=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
if [[ $threads == auto ]]; then
    cores=$(nproc)
    threads=$((cores > processes ? cores / processes : 1))
fi
export OMP_NUM_THREADS=$threads
# DDP warns if every weight had a gradient in the first step; in the last one, or with other options, some may not.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
    train_student.py --distill ega -r 1 -a 0 -b 1 --batch_size "$batch_size" "$@"
