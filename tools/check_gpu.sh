#!/usr/bin/env bash
# Check and measure speechllm on this machine's GPU, in one command: docs/gpu.md.
#
#   tools/check_gpu.sh [--minutes 8] [--output DIR] [--sounds-dir DIR] [--wheels DIR]
#
#   --wheels DIR      install nothing but the wheels of this folder, without the network, into .gpu-packages
#
# The PyTorch of the machine is used if it has one. Without --wheels, what is missing is installed into the active
# virtual environment, or into .gpu-venv, which sees the machine's packages. Other options are those of
# tools/check_gpu.py, which writes the table.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

wheels='' options=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels)
        [ $# -gt 1 ] || { echo "error: --wheels needs a folder" >&2; exit 2; }
        wheels=$(cd "$here" && realpath -- "$2")
        [ -d "$wheels" ] || { echo "error: --wheels $2: no such folder" >&2; exit 2; }
        shift
        ;;
    *) options+=("$1") ;;
    esac
    shift
done

python=${PYTHON:-python3}
if [ "$wheels" ]; then
    # No virtual environment: one that is made from another does not see its packages.
    rm -rf .gpu-packages
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target .gpu-packages \
        "$wheels"/*.whl || { echo "error: the wheels of $wheels cannot be installed" >&2; exit 1; }
    export PYTHONPATH=$PWD/.gpu-packages${PYTHONPATH:+:$PYTHONPATH}
else
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        [ -f .gpu-venv/bin/activate ] || "$python" -m venv --system-site-packages .gpu-venv
        . .gpu-venv/bin/activate
    fi
    python=python
    # Without tools/constraints.txt: any version within the ranges of setup.cfg that is there already will do.
    "$python" -m pip install --quiet --disable-pip-version-check --editable '.[gpu,test]' ||
        { echo "error: the installation failed; without a network give --wheels DIR (docs/gpu.md)" >&2; exit 1; }
fi
program=$PWD/tools/check_gpu.py
cd "$here"
exec "$python" "$program" "${options[@]}"
