#!/usr/bin/env bash
# Train on AISHELL-1 in the stages of the configuration, on all GPUs of this machine. See README.md in this folder.
#
#   recipes/aishell/train.sh [OPTION OF recipes/train.py ...] [--section.key VALUE ...]
#
# Stopped at any moment and started again with the same options, it goes on where it was. Results are in
# recipes/aishell/exp/STAGE.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

train configs/aishell.yaml recipes/aishell/exp "$@"
