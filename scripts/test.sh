#!/usr/bin/env bash
# Set-up, then all tests, on every core. Anything after the script's name goes to pytest:
# bash scripts/test.sh -n 0 tests/dataset/test_views.py -x
# An active environment with other releases, which setup.sh accepts, is the one that is tested.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the workers share the cores
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@"
