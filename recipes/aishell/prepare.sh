#!/usr/bin/env bash
# AISHELL-1 and the released parts of a model, ready for train.sh. See README.md in this folder.
#
#   recipes/aishell/prepare.sh [OPTION ...]
#
#   --corpus-dir DIR   the corpus is on disk: DIR/data_aishell (default: it is downloaded, to
#                      recipes/aishell/data/corpus)
#   --encoder X        folder, or OWNER/REPO of the Hugging Face Hub (default: AudenAI/auden-encoder-tta-m10)
#   --llm X            file, or a size of RWKV-7 G1: 0.1b, 0.4b, 1.5b, 2.9b (default: 0.4b), or OWNER/REPO/NAME
#   --musan-dir DIR    make noise for augmentation of this folder, such as musan/noise
#   --stage N          first stage (default: 1)
#   --stop-stage N     last stage (default: 5)
#
# Stages: 1 parts, 2 corpus, 3 manifests, 4 noise, 5 check. What was done with the same options is not done again.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

data=recipes/aishell/data
corpus_dir='' musan_dir='' encoder=AudenAI/auden-encoder-tta-m10 llm=0.4b stage=1 stop_stage=5
take_options corpus-dir encoder llm musan-dir stage stop-stage -- "$@"
need_speechllm

run_stage $data 1 parts python tools/download_parts.py --output-dir $data --encoder "$encoder" --llm "$llm"
if [ -z "$corpus_dir" ]; then
    run_stage $data 2 corpus python tools/prepare_corpus.py download aishell $data/corpus
    corpus_dir=$data/corpus/aishell
fi
run_stage $data 3 manifests python tools/prepare_corpus.py manifests aishell "$corpus_dir" $data
if [ -n "$musan_dir" ]; then
    run_stage $data 4 noise \
        python tools/prepare_noise.py --audio-dir "$musan_dir" --output-dir $data --prefix musan
fi
run_stage $data 5 check python -m speechllm.cli data check --config configs/aishell.yaml --tokenizer rwkv
