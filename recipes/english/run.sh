#!/usr/bin/env bash
# A recognizer of English human speech, from the packages to a table of word error rates. See README.md in this folder.
#
#   recipes/english/run.sh [--quick | --smoke] [OPTION ...]
#
#   --quick            an encoder alone, trained for a few minutes, in exp-ctc-quick
#   --smoke            all stages, each with a minute of speech or a few texts, in exp-*-smoke: shows that they work
#   --gpu              larger batches, a larger language model, bf16
#   --llm NAME         which language model reads what the encoder hears: rwkv7, smollm2, or none (default: rwkv7)
#   --corpus-dir DIR   where the Debian packages are unpacked, on systems without apt-get
#   --encoder X        folder of a Whisper, or OWNER/REPO of the Hugging Face Hub (default: Whisper tiny.en, as a package)
#   --stage N          first stage (default: 1)
#   --stop-stage N     last stage (default: 6)
#
# Stages: 1 parts and corpus, 2 lexicon and tokenizer, 3 encoder with CTC of phones, 4 language model that writes what
# phones say (rwkv7), 5 the language model reads speech, 6 table with Whisper's own decoder and pocketsphinx. A run that
# was stopped goes on where it was when it is started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/shared.sh

kind='' gpu='' rest=()
for argument in "$@"; do
    case $argument in
    --quick | --smoke) kind=-${argument#--} ;;
    --gpu) gpu=yes ;;
    *) rest+=("$argument") ;;
    esac
done
llm=rwkv7 corpus_dir='' encoder='' stage=1 stop_stage=6
take_options llm corpus-dir encoder stage stop-stage -- "${rest[@]}"
[[ $llm =~ ^(rwkv7|smollm2|none)$ ]] || die "--llm is rwkv7, smollm2 or none, not $llm"
. tools/venv.sh
install_speechllm english

here=recipes/english data=recipes/english/data
ctc=$here/exp-ctc$kind ctc_config=configs/english-ctc.yaml more=(--steel-sky --tuxpaint --flite --kokoro)
settings=() joint_settings=() llm_settings=()
slow_settings=(--optim.lr 5e-4 --optim.lr_scale '{encoder: 0.04}' --optim.warmup_steps 20 --train.num_steps 700)
llm_size=6x256 level_steps=(750 600 3300) level_tokens=(768 1536 1536)  # of each level of the text
# bfloat16 is fast where the processor has matrix products of it, and slow where it has not
if [ "$gpu" ] || grep -qs amx_bf16 /proc/cpuinfo; then
    settings+=(--train.mixed_precision bf16)
    llm_settings+=(--bf16)
fi
if [ "$gpu" ]; then
    settings+=(--data.num_workers 8 --data.max_duration 240)
    llm_size=8x448 level_steps=(300 300 1000) level_tokens=(8192 16384 16384)
fi
if [ "$kind" ]; then
    ctc_config=configs/english-quick.yaml more=()
fi
if [ "$kind" = -quick ]; then
    llm=none
elif [ "$kind" = -smoke ]; then
    settings+=(
        --data.train "[{path: $data/corpus/other.jsonl}]" --data.valid "[{path: $data/corpus/other.jsonl}]"
        --data.test "{other: [{path: $data/corpus/other.jsonl}]}"
        --train.num_steps 10 --train.valid_every_n 10 --train.save_every_n 2
    )
    joint_settings+=(--model.encoder.path "$here/exp-ctc-slow-smoke/model" --model.llm.path "$data/rwkv7-smoke")
    slow_settings=()
    llm_size=2x64 level_steps=(20 20 20) level_tokens=(512 512 512)
fi
tables=("$ctc")

# average EXP: the mean of its last checkpoints, as EXP/model, and what that makes of the test sets.
average_and_decode() {
    local exp=$1 step
    step=$(newest_step "$exp")
    python tools/average_ckpt.py --exp-dir "$exp" --iter "$step" --avg 5
    ln -sfn "iter-$step-avg-5" "$exp/model"
    python recipes/decode.py --config "$exp/config.yaml" --exp-dir "$exp" --model "$exp/model"
}

text_of_language_model() {
    local packages=${corpus_dir:-$data/packages}
    [ "$corpus_dir" ] || python tools/fetch_packages.py debian "$packages" dict-wn dict-gcide fortunes \
        r-cran-janeaustenr
    python $here/prepare_text.py --packages-dir "$packages" --corpus-dir $data/corpus --lexicon $data/lexicon \
        --output-dir $data/text
}

# language_model LEVEL: of 1 to 3, on the text of that level; the last one is the whole model.
language_model() {
    local start=(--new "$llm_size") output=$data/rwkv7$kind-level-$1
    [ "$1" = 1 ] || start=(--llm "$data/rwkv7$kind-level-$(($1 - 1))" --method full)
    [ "$1" != 3 ] || output=$data/rwkv7$kind
    python -m speechllm.cli tune "${start[@]}" --tokenizer $data/tokenizer --output "$output" \
        --text "$data/text/train-$1.jsonl" --valid "$data/text/valid-$1.jsonl" "${llm_settings[@]}" --lr 2e-3 \
        --steps "${level_steps[$1 - 1]}" --tokens-per-step "${level_tokens[$1 - 1]}" --valid-every-n 150
}

lexicon_and_tokenizer() {
    python $here/phones.py $data/corpus/train.jsonl --output $data/lexicon
    python tools/train_tokenizer.py $data/corpus/train.jsonl --output $data/tokenizer --vocab-size 1600 \
        --lexicon $data/lexicon
}

# What follows what in English, of pocketsphinx's language model: for the search.
ngram() {
    local source
    source=$(python -c 'import pocketsphinx; print(pocketsphinx.get_model_path("en-us/en-us.lm.bin"))')
    python tools/pack_ngram.py "$source" $data/ngram.safetensors --words $data/lexicon/lexicon.txt --most 1000000 \
        --relative
}

if [ "$stage" -le 1 ]; then
    $here/prepare.sh "${more[@]}" ${corpus_dir:+--corpus-dir "$corpus_dir"} ${encoder:+--encoder "$encoder"}
fi
run_stage $data 2 tokenizer lexicon_and_tokenizer
run_stage "$ctc" 3 trained \
    python recipes/train.py --config $ctc_config --exp-dir "$ctc" "${settings[@]}"
if [ "$kind" = -quick ]; then
    run_stage "$ctc" 3 decoded average_and_decode "$ctc"
else
    # What the training took away from Whisper comes back in part, and a low rate keeps it: README.md, Results.
    run_stage "$ctc" 3 decoded average_and_decode "$ctc" --released-share 0.3
    slow=$here/exp-ctc-slow$kind
    run_stage "$slow" 3 trained python recipes/train.py --config $ctc_config --exp-dir "$slow" "${settings[@]}" \
        --model.encoder.path "$ctc/model" "${slow_settings[@]}"
    run_stage "$slow" 3 decoded average_and_decode "$slow" --released-share 0.1 --released $data/encoder
    tables+=("$slow")
fi
if [ "$llm" = rwkv7 ]; then
    run_stage $data 4 text text_of_language_model
    for level in 1 2 3; do
        run_stage $data 4 "rwkv7$kind-level-$level" language_model $level
    done
fi
if [ "$llm" != none ]; then
    run_stage $data 4 ngram ngram
    exp=$here/exp-$llm$kind
    tables+=("$exp")
    run_stage "$exp" 5 trained python recipes/train.py --config "configs/english-$llm.yaml" --exp-dir "$exp" \
        "${settings[@]}" "${joint_settings[@]}"
    run_stage "$exp" 5 decoded average_and_decode "$exp"
fi
if [ "$stop_stage" -ge 6 ]; then
    echo "== 6. table"
    systems=(whisper pocketsphinx)
    [ -z "$kind" ] || systems=()
    mapfile -t recogs < <(find "${tables[@]}" -name 'recogs-*.txt' | sort)
    $here/baselines.sh "${recogs[@]}" --systems "${systems[@]}"
fi
