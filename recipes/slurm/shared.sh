# shellcheck shell=bash
# What the scripts of this folder share. They source it in the root of the repository.

# As scancel and scontrol know this job: the number of an array is that of all its jobs.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
else
    job=$SLURM_JOB_ID
fi

# run_or_requeue COMMAND...: run it. When SLURM tells this shell that the job is to end (SIGTERM, see --signal), tell all
# processes of the job, wait until they have saved, and put the job back into the queue, to go on from there.
#
# It is scancel that tells them: srun does not pass a SIGTERM on, but kills them.
run_or_requeue() {
    local told='' status=0 command
    trap 'told=yes; scancel --signal=TERM "$job"' TERM
    "$@" &
    command=$!
    # a signal ends `wait` too, before the command has ended
    while status=0 && { wait "$command" || status=$?; } && kill -0 "$command" 2>/dev/null; do :; done
    trap - TERM
    [ -n "$told" ] || return "$status"
    echo "$(date '+%F %T') told to stop: back into the queue" >&2
    scontrol requeue "$job"
}
