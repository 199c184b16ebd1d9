#!/usr/bin/env bash
# Run the linter and the test suite; arguments go to pytest. Makes .venv when no virtual environment is active.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
install_speechllm test
ruff check .
ruff format --check --quiet .
python -m pytest tests "$@"
