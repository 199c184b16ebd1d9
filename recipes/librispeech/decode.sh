#!/usr/bin/env bash
# Average the last checkpoints of a training stage, decode test-clean and test-other, print WER and CER.
#
#   recipes/librispeech/decode.sh [--subset 100|960] [OPTION ...] [--section.key VALUE ...]
#
#   --subset N     of the training (default: 960)
#   --config FILE  as given to train.sh (default: configs/librispeech-SUBSET.yaml)
#   --exp-dir DIR  as given to train.sh (default: recipes/librispeech/exp-SUBSET)
#   --stage NAME   training stage to decode (default: the last in the configuration that has checkpoints)
#   --avg K        how many checkpoints to average (default: 5)
#   --search beam, --beam N, --ctc-weight X, --hotwords FILE, ...: as recipes/decode.py --help says
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

take_subset "$@"
decode "configs/librispeech-$subset.yaml" "recipes/librispeech/exp-$subset" "${rest[@]}"
