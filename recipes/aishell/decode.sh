#!/usr/bin/env bash
# Average the last checkpoints of a training stage, decode the dev and test sets, print WER and CER.
#
#   recipes/aishell/decode.sh [OPTION ...] [--section.key VALUE ...]
#
#   --config FILE  as given to train.sh (default: configs/aishell.yaml)
#   --exp-dir DIR  as given to train.sh (default: recipes/aishell/exp)
#   --stage NAME   training stage to decode (default: the last in the configuration that has checkpoints)
#   --avg K        how many checkpoints to average (default: 5)
#   --search beam, --beam N, --ctc-weight X, --hotwords FILE, ...: as recipes/decode.py --help says
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

decode configs/aishell.yaml recipes/aishell/exp "$@"
