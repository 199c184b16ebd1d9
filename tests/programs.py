"""Scripts as a user runs them, each in a process of its own, without the seconds that Python takes to import PyTorch.

`python ...` commands are forked from a process that has imported what most of them do and has done nothing else. What a
command is, and what it does to its arguments, environment, output, signals and exit status, is as when it is started
anew; programs that it starts itself are.
"""

import atexit
import base64
import contextlib
import functools
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

_SERVER = "SPEECHLLM_TESTS_SERVER"

# What the scripts of this repository import, soon or late.
_IMPORTED = """
import accelerate, lhotse, matplotlib.figure, peft, torch, torchaudio, transformers
import torch.distributed.fsdp, torch.distributed.run, torch.utils.tensorboard, tqdm.contrib.logging
import speechllm.cli.main, speechllm.decode, speechllm.scoring, speechllm.train.state, speechllm.train.validation
import speechllm.train.preflight, speechllm.train.plot, speechllm.train.encoder_cache, speechllm.transcribe
"""


class Program:
    """A running command, with what `subprocess.Popen` says of one; its output is read while it runs."""

    def __init__(self, command, *, cwd=REPOSITORY, env=None, preexec=None):
        assert command[0] == sys.executable
        self.returncode = None
        self._texts, self._threads, outputs = {}, [], []
        for name in ("stdout", "stderr"):
            read_end, write_end = os.pipe()
            outputs.append(write_end)
            self._threads.append(threading.Thread(target=self._read, args=(name, read_end), daemon=True))
        request = {"arguments": [str(a) for a in command[1:]], "cwd": str(cwd), "env": ENV if env is None else env}
        request["preexec"] = base64.b64encode(pickle.dumps(preexec)).decode()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], outputs)
        for fd in outputs:
            os.close(fd)
        for thread in self._threads:
            thread.start()
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _read(self, name, fd):
        with open(fd, errors="replace") as file:
            self._texts[name] = file.read()

    def _wait(self):
        self.returncode = int(self._answers.readline())
        self._connection.close()

    def poll(self):
        return self.returncode

    def communicate(self, timeout=None):
        for thread in (self._waiter, *self._threads):
            thread.join(timeout)
            if thread.is_alive():
                raise subprocess.TimeoutExpired("a program", timeout)
        return self._texts["stdout"], self._texts["stderr"]

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)


def run(*command, check=True, timeout=None, **options):
    """Run a command to its end, for `timeout` seconds at most: its exit status, stdout and stderr."""
    program = Program(command, **options)
    done = subprocess.CompletedProcess(command, None, *program.communicate(timeout))
    done.returncode = program.returncode
    assert not check or done.returncode == 0, done.stderr
    return done


def run_in_processes(count, *command, check=True):
    """Run a command in several processes, as torchrun starts them; the output is that of all, one after the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    group["LOCAL_WORLD_SIZE"] = str(count)
    programs = [Program(command, env={**ENV, **group, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(count)]
    outputs = [program.communicate() for program in programs]
    status = max(abs(program.returncode) for program in programs)
    done = subprocess.CompletedProcess(command, status, *("".join(parts) for parts in zip(*outputs, strict=True)))
    assert not check or status == 0, done.stderr
    return done


def server_env():
    """What lets `Program`, in a program that a test starts, fork its commands from where the test's are."""
    return {_SERVER: _server().removeprefix("\0")}


@functools.cache
def _server():
    """The address of the process that commands are forked from; it ends with this one. A program that a test starts may
    use that of the test (`server_env`)."""
    if name := os.environ.get(_SERVER):
        return f"\0{name}"
    name = f"speechllm-tests-{os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, __file__, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV, cwd=REPOSITORY
    )
    atexit.register(process.stdin.close)
    assert process.stdout.readline() == b"ready\n"
    return f"\0{name}"  # in no folder


def _serve(name):
    """Wait for requests; returns the request in the forked process that is to run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0{name}")
    server.listen()
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:  # the tests are over
            sys.exit()
        connection, _ = server.accept()
        data, outputs, _, _ = socket.recv_fds(connection, 2**20, 2)
        while not data.endswith(b"\n"):
            data += connection.recv(2**20)
        if os.fork() == 0:
            break
        connection.close()
        for fd in outputs:
            os.close(fd)
    # the one that waits for the program, and says how it ended
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        for fd in outputs:
            os.close(fd)
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    connection.close()
    return json.loads(data), outputs


def _become(request, outputs):
    """What Python would find when it is started with this command."""
    os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, fd in enumerate(outputs, start=1):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if (preexec := pickle.loads(base64.b64decode(request["preexec"]))) is not None:
        preexec()


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)
    exec(_IMPORTED)
    _become(*(given := _serve(sys.argv[1])))
    import random
    import runpy

    import numpy

    random.seed()
    numpy.random.seed()
    program, *sys.argv = given[0]["arguments"]
    if program in ("-m", "-c"):
        name, *sys.argv[:] = sys.argv
        sys.argv.insert(0, program)
        sys.path[0] = "" if program == "-c" else os.getcwd()
        if program == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv.insert(0, program)
        runpy.run_path(program, run_name="__main__")
