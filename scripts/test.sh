#!/usr/bin/env bash
# Set-up, then all tests. Anything after the script's name goes to pytest: bash scripts/test.sh tests/test_views.py -x
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

exec "$PYTHON" -m pytest "$@"
