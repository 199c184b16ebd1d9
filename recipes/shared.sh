# What prepare.sh, train.sh and decode.sh of the recipes share. They source it in the root of the repository.

die() {
    echo "error: $*" >&2
    exit 1
}

# The comment at the head of the script that was started.
print_help() {
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
}

# The value of the option "$1".
value_of() {
    [ $# -gt 1 ] || die "$1 needs a value"
    printf '%s' "$2"
}

number_of() {
    local value
    value=$(value_of "$@")
    [[ $value =~ ^[0-9]+$ ]] || die "$1 needs a number, not $value"
    printf '%s' "$value"
}

# take_options NAME... -- ARGUMENT...: sets $corpus_dir from --corpus-dir, and so on, for the options of these names.
take_options() {
    local names=' ' name value
    while [ "$1" != -- ]; do
        names+="--$1 "
        shift
    done
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help)
            print_help
            exit 0
            ;;
        --stage | --stop-stage) value=$(number_of "$@") ;;
        *)
            [[ $names == *" $1 "* ]] || die "unknown argument $1; see $0 --help"
            value=$(value_of "$@")
            ;;
        esac
        name=${1#--}
        printf -v "${name//-/_}" %s "$value"
        shift 2
    done
}

# take_subset ARGUMENT...: sets $subset (100 or 960) from --subset, and the array $rest to the other arguments.
take_subset() {
    subset=960 rest=()
    while [ $# -gt 0 ]; do
        if [ "$1" = --subset ]; then
            subset=$(value_of "$@")
            shift
        else
            rest+=("$1")
        fi
        shift
    done
    [ "$subset" = 100 ] || [ "$subset" = 960 ] || die "--subset is 100 or 960, not $subset"
}

need_speechllm() {
    command -v python >/dev/null || die "no python: activate the virtual environment that speechllm is installed in"
    python -c 'import importlib.util as u; raise SystemExit(not all(map(u.find_spec, ("accelerate", "lhotse"))))' ||
        die "speechllm is not installed for $(command -v python):" \
        "pip install -e . (on a machine with GPUs '.[gpu]') in a virtual environment, and activate it"
}

# run_stage MARKS NUMBER NAME COMMAND...: runs COMMAND if NUMBER is from $stage to $stop_stage, and if MARKS/.NAME.done
# does not say that the same command was done before.
run_stage() {
    local marks=$1 number=$2 name=$3 mark command
    shift 3
    if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then
        return 0
    fi
    mark=$marks/.$name.done
    command=$(printf '%q ' "$@")
    if [ -f "$mark" ] && [ "$(cat "$mark")" = "$command" ]; then
        echo "== $number. $name: done before; to do it again, remove $mark"
        return 0
    fi
    echo "== $number. $name"
    "$@"
    mkdir -p "$marks"
    echo "$command" >"$mark"
}

# newest_step EXP_DIR: the highest STEP of its checkpoint-STEP.pt, nothing if there is none.
newest_step() {
    local file
    for file in "$1"/checkpoint-*.pt; do
        file=${file##*/checkpoint-}
        [ "$file" = '*.pt' ] || echo "${file%.pt}"
    done | sort -n | tail -n 1
}

# train CONFIG EXP_DIR OPTION...: what train.sh of the recipes does, with a process for each GPU. Of an option that is
# given twice the last counts.
train() {
    local config=$1 exp=$2
    shift 2
    need_speechllm
    python recipes/train.py --config "$config" --exp-dir "$exp" \
        --world-size "$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')" "$@"
}

# decode CONFIG EXP_DIR OPTION...: what decode.sh of the recipes does.
decode() {
    local config=$1 exp=$2 stage='' avg=5 settings=() name names step
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        --config) config=$(value_of "$@") ;;
        --exp-dir) exp=$(value_of "$@") ;;
        --stage) stage=$(value_of "$@") ;;
        --avg) avg=$(number_of "$@") ;;
        --*.*=*)
            settings+=("$1")
            shift
            continue
            ;;
        --*.*) settings+=("$1" "$(value_of "$@")") ;;
        --search | --beam | --nbest | --length-penalty | --ctc-* | --hotword* | --ngram*)
            settings+=("$1" "$(value_of "$@")")
            ;;
        -h | --help)
            print_help
            return 0
            ;;
        *) die "unknown argument $1; see $0 --help" ;;
        esac
        shift 2
    done
    need_speechllm
    if [ -z "$stage" ]; then
        [ -f "$config" ] || die "$config: no such configuration file"
        names=$(python -c 'import sys, yaml; print(*(yaml.safe_load(open(sys.argv[1])).get("stages") or ()))' "$config")
        for name in $names; do
            [ -z "$(newest_step "$exp/$name")" ] || stage=$name
        done
    fi
    exp=$exp${stage:+/$stage} # a configuration may have no stages
    step=$(newest_step "$exp")
    [ -n "$step" ] || die "$exp: no checkpoint-STEP.pt; train first, or give --exp-dir, --config and --stage"
    python tools/average_ckpt.py --exp-dir "$exp" --iter "$step" --avg "$avg"
    # The configuration of the run, with everything that was set on its command line.
    python recipes/decode.py --config "$exp/config.yaml" --exp-dir "$exp" --model "$exp/iter-$step-avg-$avg" \
        "${settings[@]}"
}
