#!/usr/bin/env bash
# A recognizer of English human speech, from the packages to a table of word error rates. See README.md in this folder.
#
#   recipes/english/run.sh [--quick] [OPTION ...]
#
#   --quick            an encoder alone, trained for a few minutes, in exp-ctc-quick
#   --gpu              all of the encoder is trained, on recordings made faster and slower, larger batches, bf16
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

quick='' gpu='' rest=()
for argument in "$@"; do
    case $argument in
    --quick) quick=-quick ;;
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
ctc=$here/exp-ctc$quick settings=() ctc_settings=() llm_size=6x256 llm_settings=(--tokens-per-step 1536 --steps 2300)
# bfloat16 is fast where the processor has matrix products of it, and slow where it has not
if [ "$gpu" ] || grep -qs amx_bf16 /proc/cpuinfo; then
    settings+=(--train.mixed_precision bf16)
    llm_settings+=(--bf16)
fi
if [ "$gpu" ]; then
    settings+=(
        --data.cache_encoder null --model.encoder.freeze_stacks 0 --data.num_workers 8 --data.max_duration 240
        --data.augment.speed '{factors: [0.9, 1.0, 1.1]}' --data.augment.volume '{probability: 0.3}'
        --data.augment.reverb '{probability: 0.15}'
        --data.augment.spec_augment '{freq_masks: 2, freq_mask_bins: 20, time_mask_frames: 30, max_time_fraction: 0.2}'
    )
    ctc_settings+=(--train.num_steps 2500)
    llm_size=8x448
    llm_settings=(--tokens-per-step 16384 --steps 1000 --bf16)
fi
if [ "$quick" ]; then
    llm=none
    ctc_settings+=(--train.num_steps 400 --train.valid_every_n 100 --train.save_every_n 20 --optim.warmup_steps 40)
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

text_and_language_model() {
    local packages=${corpus_dir:-$data/packages}
    [ "$corpus_dir" ] || python tools/fetch_packages.py debian "$packages" dict-wn dict-gcide fortunes
    python $here/prepare_text.py --packages-dir "$packages" --corpus-dir $data/corpus --lexicon $data/lexicon \
        --output-dir $data/text
    python -m speechllm.cli tune --new $llm_size --tokenizer $data/tokenizer --output $data/rwkv7 \
        --text $data/text/train.jsonl --valid $data/text/valid.jsonl "${llm_settings[@]}" --lr 2e-3 --valid-every-n 230
}

lexicon_and_tokenizer() {
    python $here/phones.py $data/corpus/train.jsonl --output $data/lexicon
    python tools/train_tokenizer.py $data/corpus/train.jsonl --output $data/tokenizer --vocab-size 1600 \
        --lexicon $data/lexicon
}

if [ "$stage" -le 1 ]; then
    $here/prepare.sh ${corpus_dir:+--corpus-dir "$corpus_dir"} ${encoder:+--encoder "$encoder"}
fi
run_stage $data 2 tokenizer lexicon_and_tokenizer
run_stage "$ctc" 3 trained \
    python recipes/train.py --config configs/english-ctc.yaml --exp-dir "$ctc" "${settings[@]}" "${ctc_settings[@]}"
run_stage "$ctc" 3 decoded average_and_decode "$ctc"
if [ "$llm" = rwkv7 ]; then
    run_stage $data 4 language-model text_and_language_model
fi
if [ "$llm" != none ]; then
    exp=$here/exp-$llm
    tables+=("$exp")
    run_stage "$exp" 5 trained \
        python recipes/train.py --config "configs/english-$llm.yaml" --exp-dir "$exp" "${settings[@]}"
    run_stage "$exp" 5 decoded average_and_decode "$exp"
fi
if [ "$stop_stage" -ge 6 ]; then
    echo "== 6. table"
    systems=(whisper pocketsphinx)
    [ -z "$quick" ] || systems=()
    mapfile -t recogs < <(find "${tables[@]}" -name 'recogs-*.txt' | sort)
    $here/baselines.sh "${recogs[@]}" --systems "${systems[@]}"
fi
