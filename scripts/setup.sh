# Every script sources this file, under `set -euo pipefail`. It goes to the repository's root and sets PYTHON to an
# interpreter that has what requirements.txt names: the active environment's if it has all of it, else that of
# .venv, which is made, completed or repaired here. .venv belongs to these scripts: it is built anew after an
# interrupted installation.

# Exit code 0 if the interpreter $1 has what requirements.txt names; otherwise prints the first thing it lacks.
# A later release of the same series (1.x, or 0.1.x below 1.0) will do instead of a pinned one. torchvision must be the
# one that was released with torch: 0.29 with torch 2.14, say.
has_requirements() {
    "$1" - <<'EOF' 2>/dev/null
import re
import sys
from importlib.metadata import PackageNotFoundError, version


def numbers(text):
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0]))


if sys.version_info < (3, 10):
    sys.exit(print("Python 3.10") or 1)
for line in open("requirements.txt"):
    pin, _, marker = line.split("#")[0].partition(";")
    if marker:
        comparison, limit = re.search(r'(<|>=) *"(.+)"', marker).groups()
        if (sys.version_info < numbers(limit)) != (comparison == "<"):
            continue
    if pin.strip():
        name, _, pinned = pin.strip().partition("==")
        try:
            found = version(name)
        except PackageNotFoundError:
            sys.exit(print(pin) or 1)
        if name == "torchvision":  # 0.(N + 15) belongs with torch 2.N, which stands above it
            pinned = f"0.{numbers(version('torch'))[1] + 15}"
        wanted, has = numbers(pinned)[:2], numbers(found)[:2]
        series = 1 if wanted[0] else 2
        if has[:series] != wanted[:series] or has < wanted:
            sys.exit(print(f"{name}=={pinned} (it has {found})") or 1)
EOF
}

# Prints an interpreter from which a virtual environment can be made: Python 3.10 to 3.14, for which the pinned
# torch is published. If the one found is in a virtual environment itself, it prints the one beneath.
find_python() {
    local name
    for name in python3 python python3.13 python3.12 python3.11 python3.10 python3.14; do
        "$name" - <<'EOF' 2>/dev/null && return
import sys

import ensurepip
import venv

if not (3, 10) <= sys.version_info < (3, 15):
    sys.exit(1)
print(getattr(sys, "_base_executable", None) or sys.executable)
EOF
    done
    echo "setup: found no Python 3.10 to 3.14 with its venv module; install one" \
        "(on Debian and Ubuntu: apt install python3 python3-venv)" >&2
    return 1
}

venv_is_ready() {
    cmp -s requirements.txt .venv/.setup-done && has_requirements .venv/bin/python >/dev/null
}

# This runs in a subshell, which holds the lock until it ends.
install_venv() (
    mkdir -p .venv || exit
    if command -v flock >/dev/null; then
        exec 9>.venv/.setup-lock
        flock -n 9 || { echo "setup: waiting for another script's installation" >&2; flock 9 || true; }
        venv_is_ready && exit
    fi
    if [[ -e .venv/.setup-unfinished ]] || ! .venv/bin/python -c 'import sys, pip; 1 / (sys.version_info >= (3, 10))' 2>/dev/null; then
        base=$(find_python) || exit
        touch .venv/.setup-unfinished
        find .venv -mindepth 1 -maxdepth 1 ! -name '.setup-lock' ! -name '.setup-unfinished' -exec rm -rf {} + || exit
        "$base" -m venv .venv || exit
    fi
    echo "setup: installing requirements.txt into .venv (some 5 GB; a few minutes, once)" >&2
    touch .venv/.setup-unfinished
    rm -f .venv/.setup-done
    quiet=-q
    [[ -t 1 ]] && quiet=
    if ! .venv/bin/python -m pip install $quiet --disable-pip-version-check -r requirements.txt; then
        echo "setup: the installation failed (see above); run this again to repeat it" >&2
        exit 1
    fi
    cp requirements.txt .venv/.setup-copy && mv .venv/.setup-copy .venv/.setup-done && rm .venv/.setup-unfinished
)

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
PYTHON=
for name in python3 python; do
    # With .venv active, it is still brought up to date below.
    found=$(command -v "$name") && ! [[ $(dirname -- "$found") -ef .venv/bin ]] || continue
    if lacks=$(has_requirements "$found"); then
        PYTHON=$found
        break
    elif [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && $name == python ]]; then
        echo "setup: the active environment lacks ${lacks:-a working Python}; using .venv" >&2
    fi
done
if [[ -z $PYTHON ]]; then
    venv_is_ready || install_venv
    PYTHON=$PWD/.venv/bin/python
fi
unset name found lacks

# Sets STUDENT_ARGS to the command line of train_student.py that the variables at the top of a script describe. The
# script's own arguments come last, so that they win.
set_student_args() {
    STUDENT_ARGS=(
        --distill ega --clip_mode "$clip_mode" --model_s "$model_s" --feature_dim "$feature_dim"
        -r "$r" -a "$a" -b "$b" --node_weight "$node_weight" --edge_weight "$edge_weight"
        --epochs "$epochs" --batch_size "$batch_size"
        --learning_rate "$learning_rate" --learning_rate_t "$learning_rate_t"
        --lr_decay_epochs "$lr_decay_epochs" --lr_decay_rate "$lr_decay_rate"
        --weight_decay "$weight_decay" --momentum "$momentum"
        --seed "$seed" --trial "$trial"
        --data_dir "$data_dir" --clip_root "$clip_root" --save_dir "$save_dir" "$@"
    )
}

# run_script SCRIPT OPTION...: runs a script and sets RUN to the run's folder or the CLIP's file, which ends the line
# with the accuracy.
run_script() {
    local log
    log=$(mktemp)
    PYTHONUNBUFFERED=1 "$PYTHON" "$@" | tee "$log"
    RUN=$(sed -n 's/.*accuracy.*, in //p' "$log" | tail -n 1)
    rm "$log"
}
