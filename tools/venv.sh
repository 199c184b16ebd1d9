# Sourced by run.sh and test.sh, from the repository root: install_speechllm EXTRAS
# puts speechllm[EXTRAS] into the active virtual environment, or into .venv, which is made when none is active.

install_speechllm() {
    local extras=$1 python=${PYTHON:-python3} stamp wanted
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if ! command -v "$python" >/dev/null; then
            echo "error: no $python on this machine; install Python 3.10 or newer (apt-get install python3)" >&2
            return 1
        fi
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "error: $("$python" --version) is too old: Python 3.10 or newer is needed; set PYTHON=/path/to/it" >&2
            return 1
        fi
        if [ ! -f .venv/bin/activate ]; then
            echo "making .venv with $("$python" --version)"
            if ! "$python" -m venv .venv >.venv.log 2>&1; then
                cat .venv.log >&2
                rm -rf .venv .venv.log
                echo "error: cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
                return 1
            fi
            rm -f .venv.log
        fi
        . .venv/bin/activate
    fi
    # What is installed, so that the second start takes no time.
    stamp=$VIRTUAL_ENV/.speechllm-$extras
    wanted=$(cat setup.cfg tools/constraints.txt | sha256sum; pwd)
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0
    echo "installing speechllm[$extras] into $VIRTUAL_ENV (the first time this downloads PyTorch)"
    if ! python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt \
        --editable ".[$extras]"; then
        echo "error: the installation failed; is the network there? The same command goes on where it stopped." >&2
        return 1
    fi
    echo "$wanted" >"$stamp"
}

# Training allocates and frees large blocks all the time. By default glibc maps and unmaps each one, and the page
# faults cost more than the arithmetic; these keep freed memory in the process.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456
