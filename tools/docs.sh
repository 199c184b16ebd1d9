#!/usr/bin/env bash
# Builds the pages of docs/ into site/; a broken link or a docstring that does not fit its function is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
install_speechllm docs
export NO_MKDOCS_2_WARNING=1
python -m mkdocs build --quiet --strict
