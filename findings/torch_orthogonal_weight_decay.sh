#!/usr/bin/env bash
# torch.nn.utils.parametrizations.orthogonal on a weight that is not square, under weight decay, torch 2.11.0
#
# Its default map there, 'householder', keeps the signs of its columns in the diagonal of the learned tensor, as 1 and
# -1, and reads them by `X.diagonal().int()`. A weight decay takes the diagonal below 1 in the first step, and every
# sign is 0 from then on: the weight is a matrix of zeros, which no gradient changes. Nothing is raised. A square
# weight has another default map, 'matrix_exp', and stays orthogonal. Leave such weights out of the decay, or compute
# the weight as the first factor of a QR decomposition.
#
# Seen, with Python 3.11 and torch 2.11.0:
#   (8, 5), no decay: norm 2.236; (8, 5), decay 0.05: norm 0.000; (8, 8), decay 0.05: norm 2.828
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.11.0 numpy==2.4.6
cat > "$folder/try.py" <<'PY'
import torch
from torch.nn.utils.parametrizations import orthogonal


def norm(rows, columns, decay):
    torch.manual_seed(0)
    layer = orthogonal(torch.nn.Linear(columns, rows, bias=False))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, weight_decay=decay)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(torch.randn(4, columns)) - 1).square().mean().backward()
        optimizer.step()
    return f"({rows}, {columns}), {f'decay {decay}' if decay else 'no decay'}: norm {layer.weight.norm():.3f}"


print("; ".join([norm(8, 5, 0), norm(8, 5, 0.05), norm(8, 8, 0.05)]))
PY
"$folder/env/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'OUT'
(8, 5), no decay: norm 2.236; (8, 5), decay 0.05: norm 0.000; (8, 8), decay 0.05: norm 2.828
OUT
