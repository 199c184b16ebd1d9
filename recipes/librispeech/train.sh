#!/usr/bin/env bash
# Train on LibriSpeech in the stages of the configuration, on all GPUs of this machine. See README.md in this folder.
#
#   recipes/librispeech/train.sh [--subset 100|960] [OPTION OF recipes/train.py ...] [--section.key VALUE ...]
#
# Stopped at any moment and started again with the same options, it goes on where it was. Results are in
# recipes/librispeech/exp-SUBSET/STAGE. --subset is 960 by default.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

take_subset "$@"
train "configs/librispeech-$subset.yaml" "recipes/librispeech/exp-$subset" "${rest[@]}"
