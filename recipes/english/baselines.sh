#!/usr/bin/env bash
# Whisper tiny.en with its own decoder, and pocketsphinx, on both test sets, and a table of their word error rates.
#
#   recipes/english/baselines.sh [RECOGS ...] [OPTION OF baselines.py ...]
#
# RECOGS are recogs-SET-MODEL.txt of recipes/decode.py, which are scored the same way and put into the same table.
# What was recognized before is kept in recipes/english/exp-baselines.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

[[ " $* " != *' --help '* && " $* " != *' -h '* ]] || { print_help; exit 0; }
need_speechllm
python recipes/english/baselines.py "$@"
