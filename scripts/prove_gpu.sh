#!/usr/bin/env bash
# All that only a GPU can show, within a time limit, and its tables: bash scripts/prove_gpu.sh --minutes 9
# Given again, it goes on. Anything after the script's name goes to benchmarks/on_gpu.py: --steps table, --rehearse.
#
# The machine needs python3 with PyTorch, torchvision, timm, tensorboard, matplotlib, scikit-learn, scipy and tqdm, and
# no network. What it lacks is brought along in the folder carried, which git ignores. On a machine with a network:
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
#       --platform manylinux_2_28_x86_64 -d carried/wheels clip-anytorch==2.6.0 ftfy==6.3.1 wcwidth regex==2026.11.15 \
#       tensorboard_logger==0.1.0 open_clip_torch==3.3.0 filelock==4.2.11 setuptools==80.8.0 protobuf==7.36.2
#   bash scripts/fetch_lite.sh 2 && cp CLIP/tf_efficientnet_lite2.pth carried
#   tar cz -C data cifar-100-python | split -b 45M - carried/cifar100.tar.gz.     # pieces of 45 MiB, which can travel alone
# The table alone needs the last two. An unfinished table goes on elsewhere too: bring the folder gpu along.
set -euo pipefail
carried=./carried        # folder of what was brought along
out=./gpu                # folder of the results
data_dir=./data
weights=CLIP/tf_efficientnet_lite2.pth
work=${TMPDIR:-/tmp}/ega_on_gpu

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# The interpreter is the machine's own, as nothing can be installed from elsewhere.
PYTHON=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python3
if compgen -G "$carried/wheels/*.whl" >/dev/null; then
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
        --target "$work/site" "$carried"/wheels/*.whl
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
[[ -e $weights ]] || weights=$carried/tf_efficientnet_lite2.pth
if [[ ! -e $data_dir/cifar-100-python ]] && compgen -G "$carried/cifar100.tar.gz.*" >/dev/null; then
    mkdir -p "$data_dir"
    cat "$carried"/cifar100.tar.gz.* | tar xz -C "$data_dir"
fi

exec "$PYTHON" -m benchmarks.on_gpu --out "$out" --work "$work" --data_dir "$data_dir" --weights "$weights" "$@"
