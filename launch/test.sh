#!/usr/bin/env bash
# Runs the tests: makes .venv, installs what they need where it is missing (three lists below), then runs pytest.
# usage: bash launch/test.sh [PYTEST ARGUMENTS]     (paths are relative to the repository)
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_if_asked "$@"
prepare_environment "$ROOT/requirements.txt" "$ROOT/tests/requirements.txt" "$ROOT/launch/requirements-onnx.txt"
cd "$ROOT"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder # two files at a time, by name: the longest are not last
echo "== python -m pytest $*"
exec "$PYTHON" -m pytest "$@"
