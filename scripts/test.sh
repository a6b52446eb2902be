#!/usr/bin/env bash
# Set up, then run all tests on every core. Anything after the script's name goes to pytest:
# bash scripts/test.sh -n 0 tests/dataset/test_views.py -x
# If setup.sh accepts an active environment with other releases, that environment is tested.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the workers share the cores
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@"
