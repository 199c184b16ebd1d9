#!/usr/bin/env bash
# The released parts of a model, and a check of your own manifests, ready for train.sh. See README.md in this folder.
#
#   recipes/custom/prepare.sh [OPTION ...]
#
#   --config FILE      experiment that names the manifests (default: configs/custom.yaml, which names
#                      recipes/custom/data/{train,valid,test}.jsonl)
#   --encoder X        folder, or OWNER/REPO of the Hugging Face Hub (default: AudenAI/auden-encoder-tta-m10)
#   --llm X            file, or a size of RWKV-7 G1: 0.1b, 0.4b, 1.5b, 2.9b (default: 0.4b), or OWNER/REPO/NAME
#   --musan-dir DIR    make noise for augmentation of this folder, such as musan/noise
#   --stage N          first stage (default: 1)
#   --stop-stage N     last stage (default: 3)
#
# Stages: 1 parts, 2 noise, 3 check. What was done with the same options is not done again, but for the check.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

data=recipes/custom/data
config=configs/custom.yaml musan_dir='' encoder=AudenAI/auden-encoder-tta-m10 llm=0.4b stage=1 stop_stage=3
take_options config encoder llm musan-dir stage stop-stage -- "$@"
need_speechllm

run_stage $data 1 parts python tools/download_parts.py --output-dir $data --encoder "$encoder" --llm "$llm"
if [ -n "$musan_dir" ]; then
    run_stage $data 2 noise \
        python tools/prepare_noise.py --audio-dir "$musan_dir" --output-dir $data --prefix musan
fi
rm -f $data/.check.done  # manifests change
run_stage $data 3 check python -m speechllm.cli data check --config "$config" --tokenizer rwkv
