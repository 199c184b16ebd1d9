"""A training run that is killed, told to stop, or can write no more goes on exactly: run, and stopped, as by a user."""

import contextlib
import ctypes
import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from speechllm.train.checkpoint import load_checkpoint, newest_checkpoint
from tests.programs import Program, run
from tests.recipes.test_train import command

pytestmark = pytest.mark.slow

# all checkpoints are kept, to be compared with those of a run that was never stopped
SETTINGS = ["--train.keep_last_k", "100", "--train.tensorboard", "false"]

LONG = 300  # seconds that nothing takes, on a machine that has much else to do either

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of linux/prctl.h and linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522

# Runs a script that kills itself: `half` way through the writing of the checkpoint NAME, or `before` or `after` it gets
# its name.
DIES_WHILE_SAVING = """
import io, os, runpy, signal, sys
from fnmatch import fnmatch
from pathlib import Path
import torch

moment, name, *sys.argv = sys.argv[1:]
save, replace = torch.save, os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def save_half(content, file):
    if moment == "half" and fnmatch(Path(file.name).name, name + ".*.tmp"):
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()
    save(content, file)

def replace_and_die(source, target):
    if moment == "before" and Path(target).name == name:
        die()
    replace(source, target)
    if moment == "after" and Path(target).name == name:
        die()

torch.save, os.replace = save_half, replace_and_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def difference(a, b, where=""):
    """Where two nested values first differ, to the bit, and how; None where they do not."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__}, not {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{where}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        if not torch.equal(*(t.flatten().contiguous().view(torch.uint8) for t in (a, b))):
            return f"{where}: other values"
        return None
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: only one has {sorted(map(str, a.keys() ^ b.keys()))}"
        return next(filter(None, (difference(a[key], b[key], f"{where}.{key}") for key in a)), None)
    return None if a == b else f"{where}: {a!r}, not {b!r}"


def assert_same_checkpoint(path, reference, note=None):
    """All is as in the checkpoint of that name in `reference`, but for the configuration: it has what a command may
    change, such as the number of data workers."""
    a, b = ({k: v for k, v in load_checkpoint(p).items() if k != "config"} for p in (path, reference / path.name))
    found = difference(a, b)
    assert found is None, f"{path}: {found}; {note}"


def assert_intact(exp_dir, reference, note=None):
    """The checkpoints that a stopped run leaves are those of a run that was never stopped."""
    for path in [*exp_dir.glob("checkpoint-*.pt"), *exp_dir.glob("epoch-*.pt")]:
        assert_same_checkpoint(path, reference, note)


def assert_as_never_stopped(exp_dir, reference, note=None):
    """The folder of a finished run has what one has that was never stopped, and nothing half-written."""
    names = {p.name for p in exp_dir.glob("*.pt*")}
    assert {"checkpoint-12.pt", "epoch-1.pt", "best-valid-loss.pt", "best-valid-wer.pt"} <= names, (names, note)
    for name in names:
        assert_same_checkpoint(exp_dir / name, reference, note)


def torchrun_command(experiment, exp_dir, *settings):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, *command(experiment, exp_dir, *settings)[1:]]


def wait_for(process, condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > deadline:
            kill_all(process)
            pytest.fail("what was waited for did not happen within five minutes")
        time.sleep(0.002)


def ended(process):
    """Exit status and stderr of a process that has to end within five minutes."""
    try:
        _, stderr = process.communicate(timeout=LONG)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    return process.returncode, stderr


def kill_all(process):
    """SIGKILL for all its processes, as when the machine fails."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended
        parent = psutil.Process(process.pid)
        processes = [parent, *parent.children(recursive=True)]
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(processes, timeout=10)
    process.communicate()


def kill_one_rank(process, rng):
    """SIGKILL for one of the processes that train, as when its memory runs out."""
    ranks = [p for p in psutil.Process(process.pid).children() if "recipes/train.py" in p.cmdline()]
    assert len(ranks) == 2
    rng.choice(ranks).kill()


def written(path):
    """When, in ns; 0 for never."""
    return path.stat().st_mtime_ns if path.exists() else 0


def start_and_wait(rng, last, exp_dir, reference, train_command):
    """Start a run, and wait until a random moment around one of its steps up to `last`; returns the process and a note.

    The moment is told by the steps, as a machine's speed varies.
    """
    before = written(exp_dir / "config.yaml")
    process = Program(train_command)
    wait_for(process, lambda: written(exp_dir / "config.yaml") > before)  # it is written before the first step
    step = rng.randrange(0, last + 1, 2)  # that of a checkpoint; 0: before the first one
    wait_for(process, lambda: step == 0 or any((exp_dir / f"checkpoint-{n}.pt").exists() for n in range(step, 14, 2)))
    seconds = (written(reference / "checkpoint-12.pt") - written(reference / "config.yaml")) / 1e9
    delay = rng.uniform(0, seconds / 6)  # about two steps
    time.sleep(delay)
    return process, f"{delay:.3f} s after step {step}" + (" (at its end)" if process.poll() is not None else "")


@pytest.fixture(scope="module")
def never_stopped(experiment, tmp_path_factory):
    """The folder of a run with these options that was never stopped, with a checkpoint of every step."""

    @functools.cache
    def folder(*options, launcher=command):
        exp_dir = tmp_path_factory.mktemp("never-stopped")
        run(*launcher(experiment, exp_dir, *SETTINGS, "--train.save_every_n", "1", *options))
        return exp_dir

    return folder


def test_a_difference_is_found_and_named():
    a, b = ({"optimizer": {"state": [{"exp_avg": torch.zeros(2, 3)}]}, "step": 3} for _ in range(2))
    assert difference(a, b) is None
    b["optimizer"]["state"][0]["exp_avg"][1, 2] = -0.0
    assert difference(a, b) == ".optimizer.state.0.exp_avg: other values"
    assert difference({"a": 1, "b": 2}, {"a": 1}) == ": only one has ['b']"
    assert difference([1, 2.0], [1, 2]) == ".1: float, not int"
    assert difference(torch.zeros(2), torch.zeros(2).half()) == ": torch.float32 (2,), not torch.float16 (2,)"


def test_going_on_with_other_batches_keeps_all_but_the_place_in_the_epoch(experiment, never_stopped, tmp_path):
    """As after running out of memory."""
    shutil.copy(never_stopped() / "checkpoint-3.pt", tmp_path)
    before = load_checkpoint(tmp_path / "checkpoint-3.pt")
    assert not before["loader"][0]["finished"]
    result = run(*command(experiment, tmp_path, *SETTINGS, "--start-batch", "3", "--data.max_duration", "3"))
    epoch, said = before["epoch"], r"max_duration was 4(\.0)?, is 3"
    assert re.search(rf"epoch {epoch} begins anew: its \d+ batches so far were made with .*{said}", result.stderr)
    assert f"resuming from {tmp_path / 'checkpoint-3.pt'}: epoch {epoch}, step 3" in result.stderr
    after = load_checkpoint(tmp_path / "checkpoint-4.pt")
    assert (after["step"], after["loader"][0]["batches"]) == (4, 1)
    name, parameter = next((n, p) for n, p in before["model"].items() if p.ndim == 2)
    assert 0 < (after["model"][name] - parameter).abs().max() < 0.1 * parameter.abs().max()  # one step further
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 12


def test_killed_at_any_moment(experiment, never_stopped, tmp_path):
    """With any number of processes that read data, none included."""
    reference, exp_dir = never_stopped(), tmp_path / "exp"
    seed = time.time_ns()
    rng, note = random.Random(seed), [f"seed {seed}"]
    for workers, last in (("0", 4), ("2", 8)):
        train_command = command(experiment, exp_dir, *SETTINGS, "--data.num_workers", workers)
        process, moment = start_and_wait(rng, last, exp_dir, reference, train_command)
        note.append(moment)
        kill_all(process)
        assert_intact(exp_dir, reference, note)
    assert any("at its end" not in moment for moment in note[1:]), note
    run(*command(experiment, exp_dir, *SETTINGS))
    assert_as_never_stopped(exp_dir, reference, note)


def test_killed_while_saving(experiment, never_stopped, tmp_path):
    """In bfloat16: half-way through a checkpoint, before one gets its name, and between two that belong together."""
    reference, exp_dir = never_stopped("--use-bf16"), tmp_path / "exp"
    train_command = command(experiment, exp_dir, *SETTINGS, "--use-bf16")
    for moment, name, newest in (
        ("half", "checkpoint-4.pt", "checkpoint-2.pt"),
        ("before", "epoch-1.pt", "checkpoint-6.pt"),
        ("after", "best-valid-loss.pt", "checkpoint-8.pt"),
    ):
        status, stderr = ended(Program([sys.executable, "-c", DIES_WHILE_SAVING, moment, name, *train_command[1:]]))
        assert status == -signal.SIGKILL, stderr
        leftovers = [p.name.partition(".pt")[0] + ".pt" for p in exp_dir.glob("*.tmp")]
        assert leftovers == ([] if moment == "after" else [name])
        assert newest_checkpoint(exp_dir) == exp_dir / newest
        assert_intact(exp_dir, reference, moment)
    run(*train_command)
    assert_as_never_stopped(exp_dir, reference)


def test_a_job_that_is_told_to_stop_saves_first(experiment, never_stopped, tmp_path):
    """SIGTERM for all of its processes, those that read data included, as some schedulers send it."""
    train_command = command(experiment, tmp_path, *SETTINGS, "--train.save_every_n", "1000")
    process = Program(train_command)
    wait_for(process, (tmp_path / "best-valid-loss.pt").exists)
    os.killpg(process.pid, signal.SIGTERM)
    status, stderr = ended(process)
    assert status == 0 and "Traceback" not in stderr, stderr
    step = load_checkpoint(newest_checkpoint(tmp_path))["step"]
    assert step < 12 and f"stopped by a signal at step {step};" in stderr
    run(*train_command)
    assert_as_never_stopped(tmp_path, never_stopped())


def test_two_processes_however_they_are_stopped(experiment, never_stopped, tmp_path):
    """Told to stop through their launcher; killed, both; one killed, which has to bring down the other."""
    reference, exp_dir = never_stopped(launcher=torchrun_command), tmp_path / "exp"
    train_command = torchrun_command(experiment, exp_dir, *SETTINGS)

    process = Program(command(experiment, exp_dir, *SETTINGS, "--world-size", "2"))
    wait_for(process, (exp_dir / "checkpoint-2.pt").exists)
    process.terminate()
    status, stderr = ended(process)
    step = load_checkpoint(newest_checkpoint(exp_dir))["step"]
    assert step < 12 and f"stopped by a signal at step {step};" in stderr, stderr
    assert status == 0 and "Traceback" not in stderr, stderr
    assert_intact(exp_dir, reference)

    seed = time.time_ns()
    rng, note = random.Random(seed), [f"seed {seed}"]
    process, moment = start_and_wait(rng, 6, exp_dir, reference, train_command)
    note.append(moment)
    kill_all(process)
    assert_intact(exp_dir, reference, note)

    process, moment = start_and_wait(rng, 8, exp_dir, reference, train_command)
    note.append(moment)
    kill_one_rank(process, rng)
    status, stderr = ended(process)
    assert status == 1, (note, stderr)
    assert_intact(exp_dir, reference, note)

    run(*train_command)
    assert_as_never_stopped(exp_dir, reference, note)


def drop_the_right_to_write_everywhere():
    """Takes from root what makes it pass over the permissions of files; others have not got it."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        # of the programs that it starts
        assert libc.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0
        # and of itself: effective, permitted and inheritable capabilities, of 32 bits, twice (capset(2))
        header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~(1 << CAP_DAC_OVERRIDE)
        assert libc.capset(header, sets) == 0


def assert_cannot_write(process, path, reason):
    status, stderr = ended(process)
    assert status == 1 and re.search(f"error: {path}.*: {reason}", stderr), stderr


def test_where_nothing_more_can_be_written_training_stops_with_the_reason(experiment, never_stopped, tmp_path):
    reference, exp_dir = never_stopped(), tmp_path / "exp"
    train_command = command(experiment, exp_dir, *SETTINGS)
    exp_dir.mkdir()
    shutil.copy(reference / "checkpoint-2.pt", exp_dir)

    # The disk is full half-way through a checkpoint: a limit on the size of files has the same effect.
    half = (exp_dir / "checkpoint-2.pt").stat().st_size // 2
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (half, half))
    process = Program(train_command, preexec=limit)
    assert_cannot_write(process, exp_dir / "checkpoint-4.pt", "cannot be written: File too large")
    assert {p.name for p in exp_dir.glob("*.pt*")} == {"checkpoint-2.pt"}

    # It is full for the logs too, which are written before the next checkpoint.
    process = Program([*train_command, "--train.tensorboard", "true", "--train.log_every_n", "1"])
    wait_for(process, (exp_dir / "checkpoint-4.pt").exists)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
    assert_cannot_write(process, exp_dir, "File too large")
    assert_intact(exp_dir, reference)

    # The folder can no longer be written to.
    process = Program(train_command, preexec=drop_the_right_to_write_everywhere)
    wait_for(process, (exp_dir / "checkpoint-6.pt").exists)
    exp_dir.chmod(0o555)
    assert_cannot_write(process, exp_dir, "cannot be written: Permission denied")
    assert_intact(exp_dir, reference)

    exp_dir.chmod(0o755)
    run(*train_command)
    assert_as_never_stopped(exp_dir, reference)


def test_a_folder_that_cannot_be_made(experiment, tmp_path):
    tmp_path.chmod(0o555)
    process = Program(command(experiment, tmp_path / "exp"), preexec=drop_the_right_to_write_everywhere)
    assert_cannot_write(process, tmp_path / "exp", "Permission denied")
