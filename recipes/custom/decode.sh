#!/usr/bin/env bash
# Average the last checkpoints of a training stage, decode the configuration's test sets, print WER and CER.
#
#   recipes/custom/decode.sh [OPTION ...] [--section.key VALUE ...]
#
#   --config FILE  as given to train.sh (default: configs/custom.yaml)
#   --exp-dir DIR  as given to train.sh (default: recipes/custom/exp)
#   --stage NAME   training stage to decode (default: the last in the configuration that has checkpoints)
#   --avg K        how many checkpoints to average (default: 5)
#   --search beam, --beam N, --ctc-weight X, --hotwords FILE, ...: as recipes/decode.py --help says
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

decode configs/custom.yaml recipes/custom/exp "$@"
