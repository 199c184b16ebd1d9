#!/usr/bin/env bash
# Run the linter, the type checker and the test suite; arguments go to pytest (-m "not slow": what
# takes minutes is left out). Makes .venv when no virtual environment is active.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
install_speechllm test
# kenlm has no wheels: where it cannot be built, the one test that compares it with our n-grams is skipped.
if command -v c++ >/dev/null; then install_speechllm ngram || echo "kenlm cannot be built here; going on without"; fi
# The tests' tensors are small: more threads only wait for each other.
export OMP_NUM_THREADS=1
ruff check .
ruff format --check --quiet .
mypy
# Two at a time; the tests of a file stay together, as they share what takes long to make.
python -m pytest tests --numprocesses 2 --dist loadfile "$@"
