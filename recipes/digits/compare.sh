#!/usr/bin/env bash
# Variants of the model trained briefly with one seed, decoded, and put into one table. See README.md in this folder.
#
#   recipes/digits/compare.sh [VARIANT...] [--exp-dir DIR] [--variants FILE]
#
# The variants are those of recipes/digits/compare.yaml. A run that was stopped goes on where it was when it is started
# again; the table is in exp-compare/table.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

case ${1:-} in
-h | --help)
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 0
    ;;
esac
. tools/venv.sh
install_speechllm plot
python recipes/digits/prepare_corpus.py --output-dir recipes/digits/data
python recipes/digits/train_tokenizer.py --data-dir recipes/digits/data --vocab-size 400
python recipes/digits/compare.py "$@"
