#!/usr/bin/env bash
# torch 2.11.0: making any optimiser imports the compiler.
#
# `import torch` leaves torch._dynamo out. torch.optim.SGD(...) imports it, since the wrappers around add_param_group
# do, and with it sympy and some hundred modules, though nothing is compiled: most of the start of a short training
# program. inspect.unwrap() of the wrapped methods, on a subclass, avoids it.
#
# Seen:
#   after import torch: torch._dynamo False, sympy False
#   after torch.optim.SGD: torch._dynamo True, sympy True
#   at least 400 more modules: True
#   after torch.optim.SGD of unwrapped methods: torch._dynamo False
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.11.0
cat > "$folder/try.py" <<'PY'
import sys

import torch


def imported(name):
    return name in sys.modules


weight = [torch.nn.Parameter(torch.zeros(2))]
if sys.argv[1:] == ["unwrapped"]:
    import inspect

    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    plain = type("SGD", (torch.optim.SGD,), {n: inspect.unwrap(getattr(torch.optim.SGD, n)) for n in names})
    plain(weight, lr=0.1)
    print(f"after torch.optim.SGD of unwrapped methods: torch._dynamo {imported('torch._dynamo')}")
else:
    before = len(sys.modules)
    print(f"after import torch: torch._dynamo {imported('torch._dynamo')}, sympy {imported('sympy')}")
    torch.optim.SGD(weight, lr=0.1)
    print(f"after torch.optim.SGD: torch._dynamo {imported('torch._dynamo')}, sympy {imported('sympy')}")
    print(f"at least 400 more modules: {len(sys.modules) - before >= 400}")
PY
{ "$folder/env/bin/python" "$folder/try.py"; "$folder/env/bin/python" "$folder/try.py" unwrapped; } | tee "$folder/seen"
diff "$folder/seen" - <<'OUT'
after import torch: torch._dynamo False, sympy False
after torch.optim.SGD: torch._dynamo True, sympy True
at least 400 more modules: True
after torch.optim.SGD of unwrapped methods: torch._dynamo False
OUT
