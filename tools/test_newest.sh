#!/usr/bin/env bash
# Tests speechllm as users get it: its wheel, with the newest versions that setup.cfg admits and no constraints file, in
# a new virtual environment, .venv-newest. First without what only tests need, then the tests that touch third parties,
# all from another directory, so that nothing is imported from the checkout.
#
# PyTorch is installed once more, on purpose: another version of it than tools/constraints.txt names is what may fail.
# Where pip has its wheel in the cache that takes a minute or two.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD venv=$PWD/.venv-newest
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
unset PYTHONPATH PIP_CONSTRAINT
export OMP_NUM_THREADS=1

"${PYTHON:-python3}" -m venv --clear "$venv"
python=$venv/bin/python
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
# Built from a copy: what setuptools leaves in a tree would have modules in the wheel that were moved since.
mkdir "$outside/source"
cp -r speechllm setup.cfg pyproject.toml README.md LICENSE "$outside/source"
pip wheel --no-deps --wheel-dir "$outside" "$outside/source"
rm -rf "$outside/source"
wheel=$(echo "$outside"/*.whl)
pip install "$wheel"
cp -r tests "$outside"
cd "$outside"
"$venv/bin/speechllm" --help >/dev/null
"$python" "$root/tools/check_installed.py"
pip install "$wheel[test]"
"$python" -m pip list --disable-pip-version-check --format freeze |
    grep -iE '^(torch|torchaudio|transformers|tokenizers|peft|accelerate|lhotse|huggingface.hub|torchao|numpy)=='
"$python" -m pytest -q -p no:cacheprovider --numprocesses 2 --dist loadfile -m "not slow" tests/llm tests/encoder/test_whisper.py \
    tests/encoder/test_transducer.py tests/encoder/test_onnx.py tests/model/test_export.py tests/decode/test_ctc.py tests/data/test_resample.py tests/data/test_features.py \
    tests/data/test_audio.py tests/text/test_tokenizer.py tests/scoring/test_counting.py "$@"
