#!/usr/bin/env bash
# Train on your own manifests in the stages of the configuration, on all GPUs here. See README.md in this folder.
#
#   recipes/custom/train.sh [OPTION OF recipes/train.py ...] [--section.key VALUE ...]
#
# Stopped at any moment and started again with the same options, it goes on where it was. Results are in
# recipes/custom/exp/STAGE.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

train configs/custom.yaml recipes/custom/exp "$@"
