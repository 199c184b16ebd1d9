#!/usr/bin/env bash
# Speed, memory and error beside the packages that people use today, in an environment of the benches' own:
#   tools/bench.sh [--threads 2] [--repeat 5]          all of these
#   tools/bench.sh wkv [options of bench_wkv.py]       the recurrence alone
#   tools/bench.sh rwkv [options of bench_rwkv.py]     training, decoding and prefill of a model
#   tools/bench.sh decode [options of bench_decode.py] decoding speech: searches, encoder
# The environment is .bench-venv; run it on an otherwise idle machine.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh  # also sets the allocator as training has it

# What is measured beside speechllm. fla-core needs triton even for its PyTorch form; [cpu] asks for it without CUDA.
packages=("fla-core[cpu]==0.6.0" rwkv==0.8.32 rwkv7-hf==0.9.0)

python=${PYTHON:-python3}
if [ ! -f .bench-venv/bin/activate ]; then
    echo "making .bench-venv with $("$python" --version)"
    if ! "$python" -m venv .bench-venv; then
        rm -rf .bench-venv
        echo "error: cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi
. .bench-venv/bin/activate
# speechllm first: its constraints decide which torch there is, and the others take that one.
install_speechllm test
stamp=.bench-venv/.bench-packages
if [ "$(cat "$stamp" 2>/dev/null)" != "${packages[*]}" ]; then
    echo "installing ${packages[*]}"
    if ! python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt "${packages[@]}"
    then
        echo "error: the installation failed; is the network there? The same command goes on where it stopped." >&2
        exit 1
    fi
    echo "${packages[*]}" >"$stamp"
fi

case ${1:-} in
    wkv | rwkv | decode) programs=("$1") && shift ;;
    *) programs=(wkv rwkv decode) ;;
esac
status=0
for program in "${programs[@]}"; do
    python "tools/bench_$program.py" "$@" || status=$?
done
exit "$status"
