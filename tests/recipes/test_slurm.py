"""recipes/slurm, with programs in place of SLURM's: nodes are processes of this machine, and the test requeues."""

import os
import subprocess
import sys

import pytest

from speechllm.train.checkpoint import load_checkpoint, newest_checkpoint
from tests.programs import ENV, REPOSITORY, run_in_processes, server_env
from tests.recipes.test_resume import (
    SETTINGS,
    assert_as_never_stopped,
    ended,
    wait_for,
)
from tests.recipes.test_train import command

SCRIPTS = REPOSITORY / "recipes/slurm"

# Runs what it is given once for each node, as in a step of a job, and notes the processes for scancel.
SRUN = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from itertools import dropwhile
from pathlib import Path
from tests.programs import Program

program, *arguments = dropwhile(lambda word: word.startswith("--"), sys.argv[1:])
if program == "torchrun":
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
else:
    command = [sys.executable, *arguments]
programs = [Program(command, cwd=os.getcwd()) for _ in range(int(os.environ["SLURM_NNODES"]))]
Path("pids").write_text(" ".join(str(program.pid) for program in programs))
outputs = [program.communicate() for program in programs]
for out, err in outputs:
    sys.stdout.write(out)
    sys.stderr.write(err)
sys.exit(max(abs(program.returncode) for program in programs))
"""
# To all processes of the steps.
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >> calls
for pid in $(cat pids); do kill -TERM -- "-$pid"; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; else echo "scontrol $*" >> calls; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """`start(script, ...)` starts a script as a job of a number of nodes, in a folder that has the repository's
    recipes."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}

    def start(script, *arguments, nodes=1, **variables):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        env = ENV | server_env() | job | {"PATH": path, "SLURM_NNODES": str(nodes)} | variables
        return subprocess.Popen(
            ["bash", SCRIPTS / script, *map(str, arguments)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.slow
def test_two_nodes_preempted_and_requeued_train_as_two_processes_do(experiment, slurm, tmp_path):
    """The agents of the nodes find each other over TCP, before and after."""
    exp_dir = tmp_path / "exp"
    options = command(experiment, exp_dir, *SETTINGS, "--train.save_every_n", "1000")[2:]
    job = slurm("train.sbatch", *options, nodes=2)
    wait_for(job, (exp_dir / "best-valid-loss.pt").exists)
    job.terminate()
    status, stderr = ended(job)
    step = load_checkpoint(newest_checkpoint(exp_dir))["step"]
    assert 0 < step < 12 and f"stopped by a signal at step {step};" in stderr, stderr
    assert status == 0 and "told to stop: back into the queue" in stderr, stderr
    assert (tmp_path / "calls").read_text() == f"scancel --signal=TERM {os.getpid()}\nscontrol requeue {os.getpid()}\n"

    job = slurm("train.sbatch", *options, nodes=2, SLURM_RESTART_COUNT="1")
    status, stderr = ended(job)
    assert status == 0 and "done: 12 steps" in stderr, stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2  # it has come to its end
    run_in_processes(2, *command(experiment, tmp_path / "reference", *SETTINGS, "--train.save_every_n", "1"))
    assert_as_never_stopped(exp_dir, tmp_path / "reference")


def test_jobs_of_an_array_have_their_shares_and_are_requeued(slurm, tmp_path):
    script = (
        "import sys, time\n"
        "if '--hold' in sys.argv:\n"
        "    open('ready', 'w').close()\n"
        "    time.sleep(60)\n"
        "print(sys.argv[1:])\n"
        "sys.exit('--fail' in sys.argv and 3)\n"
    )
    (tmp_path / "work.py").write_text(script)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    for options, status in ([], 0), (["--fail"], 3):
        job = slurm("array.sbatch", "python", tmp_path / "work.py", *options, **array)
        stdout, stderr = job.communicate(timeout=300)
        assert job.returncode == status, stderr
        assert stdout == f"{[*options, '--world-size', '8', '--rank', '3']}\n"
    assert not (tmp_path / "calls").exists()
    job = slurm("array.sbatch", "python", tmp_path / "work.py", "--hold", **array)
    wait_for(job, (tmp_path / "ready").exists)
    job.terminate()
    assert ended(job)[0] == 0
    assert (tmp_path / "calls").read_text() == "scancel --signal=TERM 7_3\nscontrol requeue 7_3\n"
