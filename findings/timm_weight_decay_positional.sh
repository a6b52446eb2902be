#!/usr/bin/env bash
# timm.optim.param_groups_weight_decay(model, weight_decay, model.no_weight_decay()), timm 1.0.26 against 1.0.28
#
# The list of exempt parameters was the third positional argument up to 1.0.26. From 1.0.28 on the third is
# `weight_decay_exclude_1d`, a bool, and the list is the fourth. A call that gives the list by its place still runs:
# a set with names counts as True, so that the names are ignored and positions and class token decay; an empty list
# counts as False, so that gains and biases decay as well. Neither raises nor warns. Give the list by its keyword.
#
# Seen, with Python 3.11 and torch 2.11.0:
#   timm 1.0.26: vit exempts cls_token and pos_embed: True; resnet exempts 41 of 62
#   timm 1.0.28: vit exempts cls_token and pos_embed: False; resnet exempts 0 of 62
#   timm 1.0.28, by keyword: vit exempts cls_token and pos_embed: True; resnet exempts 41 of 62
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.11.0 torchvision==0.26.0 timm==1.0.26
cat > "$folder/try.py" <<'PY'
import sys

import timm
from timm.optim import param_groups_weight_decay


def exempt(name, by_keyword, **options):
    model = timm.create_model(name, pretrained=False, num_classes=10, **options)
    told = getattr(model, "no_weight_decay", tuple)()
    more = {"no_weight_decay_list": told} if by_keyword else {}
    groups = param_groups_weight_decay(model, 0.05, *(() if by_keyword else (told,)), **more)
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = [n for n, _ in model.named_parameters()]
    return names, {n for n, p in model.named_parameters() if id(p) in spared}


by_keyword = "keyword" in sys.argv
_, vit = exempt("vit_tiny_patch16_224", by_keyword)
names, resnet = exempt("resnet18", by_keyword)
print(
    f"timm {timm.__version__}{', by keyword' if by_keyword else ''}: "
    f"vit exempts cls_token and pos_embed: {vit >= {'cls_token', 'pos_embed'}}; "
    f"resnet exempts {len(resnet)} of {len(names)}"
)
PY
{
  "$folder/env/bin/python" "$folder/try.py"
  "$folder/env/bin/pip" install -q timm==1.0.28
  "$folder/env/bin/python" "$folder/try.py"
  "$folder/env/bin/python" "$folder/try.py" keyword
} | tee "$folder/seen"
diff "$folder/seen" - <<'OUT'
timm 1.0.26: vit exempts cls_token and pos_embed: True; resnet exempts 41 of 62
timm 1.0.28: vit exempts cls_token and pos_embed: False; resnet exempts 0 of 62
timm 1.0.28, by keyword: vit exempts cls_token and pos_embed: True; resnet exempts 41 of 62
OUT
