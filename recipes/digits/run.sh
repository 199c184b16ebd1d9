#!/usr/bin/env bash
# Connected digits in five languages, from the recordings to the WER table. See README.md in this folder.
#
#   recipes/digits/run.sh [--config FILE] [--quick] [--sounds-dir DIR]
#
#   --config FILE     another configuration than configs/digits.yaml, such as configs/digits-ctc.yaml, which is trained
#                     in exp-ctc for its own number of steps
#   --quick           a minute of training only, in exp-quick: shows that the whole way works
#   --sounds-dir DIR  recordings that are on disk already (systems without apt-get)
#
# A run that was stopped goes on where it was when it is started again.
set -euo pipefail
cd "$(dirname "$0")/../.."

config=configs/digits.yaml avg=5 quick=
settings=() corpus=()
while [ $# -gt 0 ]; do
    case $1 in
    --quick)
        quick=-quick avg=2
        ;;
    --config)
        [ $# -gt 1 ] || { echo "error: --config needs a file" >&2; exit 2; }
        [ -f "$2" ] || { echo "error: --config $2: no such file" >&2; exit 2; }
        config=$2
        shift
        ;;
    --sounds-dir)
        [ $# -gt 1 ] || { echo "error: --sounds-dir needs a folder" >&2; exit 2; }
        corpus=(--sounds-dir "$2")
        shift
        ;;
    -h | --help)
        sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
        exit 0
        ;;
    *)
        echo "error: unknown argument $1; see $0 --help" >&2
        exit 2
        ;;
    esac
    shift
done

. tools/venv.sh
install_speechllm plot
# configs/digits.yaml -> exp, configs/digits-ctc.yaml -> exp-ctc
name=$(basename "$config" .yaml)
name=${name#digits}
exp=recipes/digits/exp${name:+-${name#-}}$quick
num_steps=$(sed -n 's/^  num_steps: *\([0-9]*\).*/\1/p' "$config")
# where the last stage of a configuration with stages is trained
last=$(sed -n '/^stages:/,/^[a-z]*:$/s/^  \([a-z_]*\):.*/\1/p' "$config" | tail -n 1)
trained=$exp${last:+/$last}
if [ "$quick" ]; then
    num_steps=100
    settings=(--train.num_steps 100 --optim.warmup_steps 20)
    if grep -q '^  ctc_only_steps:' "$config"; then
        settings+=(--train.ctc_only_steps 50)
    fi
fi

echo "== 1. corpus and manifests"
python recipes/digits/prepare_corpus.py --output-dir recipes/digits/data "${corpus[@]}"

echo "== 2. tokenizer"
python recipes/digits/train_tokenizer.py --data-dir recipes/digits/data --vocab-size 400

echo "== 3. training"
python recipes/train.py --config "$config" --exp-dir "$exp" "${settings[@]}"

echo "== 4. averaging"
python tools/average_ckpt.py --exp-dir "$trained" --iter "$num_steps" --avg $avg
model=$trained/iter-$num_steps-avg-$avg

echo "== 5. decoding"
python recipes/decode.py --config "$config" --exp-dir "$exp" --model "$model"

if grep -q '^  streaming:' "$config"; then
    echo "== 6. streams"
    python recipes/streaming_decode.py --config "$config" --exp-dir "$exp" --model "$model" \
        --chunk-seconds 0.32 0.64 1.28 offline
fi
