#!/usr/bin/env python3
r"""How many clients `speechllm serve` holds: live streams in real time, uploads, memory. All on this machine.

    pip install -e ".[serve]" httpx
    tools/bench_serve.py --model recipes/digits/exp-streaming/write/iter-2400-avg-5 --language en \
        --manifest recipes/digits/data/test-en.jsonl --streams 1 8 16 32 64 --seconds 20

A server is started in a process of its own, with one thread for the model. For each number of streams, so many clients
play utterances of the manifests, 0.1 s at a time as they would be spoken, each from another place, for --seconds. The
delay of words is from when the client has sent the sample that they needed (`audio_end`) to when their event has come.
It ends when 95 % of them are no longer within a second. "per core" is how many streams the time that the server has
computed for (user and system, from /proc) would suffice for: other processes have no influence on it. Then --uploads
clients send the utterances one after the other, for --seconds. With --url that is done to another server of OpenAI's
interface, which runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import quantiles
from time import monotonic

import httpx
import numpy as np
from bench_wkv import print_table
from websockets.asyncio.client import connect

from speechllm.cli.exits import run_to_exit
from speechllm.cli.options import positive
from speechllm.data.audio import load_samples
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.manifests.manifest import describe_cut, read_manifest
from speechllm.errors import UserError

PIECE = SAMPLE_RATE // 10
MOST_DELAY = 1.0
# For the server to load the model, and for the last events.
START_SECONDS, REST_SECONDS = 120.0, 1.0
ROOT = Path(__file__).parents[1]


@dataclass
class Server:
    """A server in another process."""

    pid: int | None  # None where it is not known
    url: str

    @property
    def cpu_seconds(self) -> float:
        if self.pid is None:
            return math.nan
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> int:
        """Resident, in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Played:
    """The delays of words that the clients of one number of streams have seen, in seconds."""

    delays: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument("--model", type=Path, help="folder of a trained model")
    served.add_argument("--url", help="of a server that runs, such as http://127.0.0.1:9000; uploads only")
    parser.add_argument("--pid", type=int, help="of the process that --url is of, for its share of a core")
    parser.add_argument("--name", help="of its model")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="what the clients say")
    parser.add_argument("--language", help="of the speech")
    parser.add_argument(
        "--streams", type=positive, nargs="+", default=[1, 8, 16, 32, 64], help="(default: 1 8 16 32 64)"
    )
    parser.add_argument("--uploads", type=positive, default=8, help="clients at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number (default: %(default)g)")
    parser.add_argument("--options", nargs="*", default=[], help="of speechllm serve, without their two dashes: beam=4")
    run_to_exit(lambda: measure(parser.parse_args()))


def measure(args: argparse.Namespace) -> None:
    entries = [(cut, describe_cut(cut)) for path in args.manifest for cut in read_manifest(path)]
    files = [(Path(cut.recording.sources[0].source), cut.duration) for cut, _ in entries]
    audio = np.concatenate([load_samples(cut) for cut, _ in entries])
    if not len(audio):
        raise UserError(f"{args.manifest[0]}: there is no utterance in it")
    if args.url is not None:
        show_uploads(Server(args.pid, args.url), files, args)
        return
    process, url = start(args)
    server = Server(process.pid, url)
    try:
        asyncio.run(live(server, audio, 1, 3.0, args.language))  # what is made once is made
        rows = []
        for streams in args.streams:
            rows.append(asyncio.run(live(server, audio, streams, args.seconds, args.language)))
            if rows[-1][3] > 1000 * MOST_DELAY:
                break
        title = ["streams", "words", "delay, ms: median", "p95", "of a core", "streams per core", "KiB/stream"]
        print_table(title, [[f"{value:.0f}" if i != 4 else f"{value:.2f}" for i, value in enumerate(r)] for r in rows])
        show_uploads(server, files, args)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def show_uploads(server: Server, files: list[tuple[Path, float]], args: argparse.Namespace) -> None:
    row = asyncio.run(uploads(server, files, args))
    print_table(["clients", "uploads a minute", "times real time", "of a core"], [row])


def start(args: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    most = max(*args.streams, args.uploads)
    limits = {"max-streams": most, "max-connections": 2 * most + 64, "requests-per-minute": 10**6}
    command = [sys.executable, "-m", "speechllm.cli", "serve", "--model", str(args.model), "--port", "0"]
    command += [f"--{name}={value}" for name, value in limits.items()] + [f"--{option}" for option in args.options]
    command += [f"--language={args.language}"] if args.language else []
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    if ": http://" not in line:
        raise UserError(f"the server has not started: {line or 'it says why above'}")
    print(line.strip())
    return process, line.split(": ")[1].split(",")[0]


async def live(server: Server, audio: np.ndarray, streams: int, seconds: float, language: str | None) -> list[float]:
    """A row: streams, words, delays, share of a core, streams per core, memory per stream."""
    before, cpu, began = server.memory, server.cpu_seconds, monotonic()
    played = Played()
    parts = [np.roll(audio, -i * len(audio) // streams)[: int(seconds * SAMPLE_RATE)] for i in range(streams)]
    # people do not begin all at once
    clients = [play(server, part, language, i / streams, played) for i, part in enumerate(parts)]
    during = asyncio.ensure_future(_memory_later(server, seconds * 0.9))
    await asyncio.gather(*clients)
    share = (server.cpu_seconds - cpu) / (monotonic() - began)
    delays = quantiles(played.delays, n=20) if len(played.delays) > 1 else [math.nan] * 19
    memory = (await during - before) / streams / 1024
    return [streams, len(played.delays), 1000 * delays[9], 1000 * delays[18], share, streams / share, max(0.0, memory)]


async def _memory_later(server: Server, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return server.memory


async def play(server: Server, audio: np.ndarray, language: str | None, after: float, played: Played) -> None:
    """One client, in real time, that begins after so many seconds."""
    sent = [0.0]  # when each piece was
    async with connect(f"ws{server.url[4:]}/v1/realtime?intent=transcription", compression=None) as socket:
        heard = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}, "transcription": {"language": language}}
        session = {"type": "transcription", "audio": {"input": heard}}
        await socket.send(json.dumps({"type": "session.update", "session": session}))
        reader = asyncio.ensure_future(read(socket, sent, played))
        began = monotonic() + after
        data = (audio * 32767).astype("<i2")
        for number, at in enumerate(range(0, len(data), PIECE), start=1):
            await asyncio.sleep(max(0.0, began + number * PIECE / SAMPLE_RATE - monotonic()))
            piece = base64.b64encode(data[at : at + PIECE].tobytes()).decode()
            await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": piece}))
            sent.append(monotonic())
        await asyncio.wait({reader}, timeout=REST_SECONDS)
        reader.cancel()
        if reader.done() and not reader.cancelled():
            reader.result()  # what was wrong, if anything was


async def read(socket, sent: list[float], played: Played) -> None:
    """Note the delays of words."""
    async for text in socket:
        came, event = monotonic(), json.loads(text)
        if event["type"] == "error":
            raise UserError(f"the server says: {event['error']['message']}")
        if event["type"].endswith(".delta"):
            needed = min(len(sent) - 1, -(-round(event["audio_end"] * SAMPLE_RATE) // PIECE))
            played.delays += [came - sent[needed]] * max(1, len(event["words"] or ()))


async def uploads(server: Server, files: list[tuple[Path, float]], args: argparse.Namespace) -> list[str]:
    """A row: clients, uploads a minute, audio in real times, share of a core."""
    fields = {name: value for name, value in (("language", args.language), ("model", args.name)) if value}
    cpu, began = server.cpu_seconds, monotonic()
    done, seconds, number = 0, 0.0, count()

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal done, seconds
        while monotonic() - began < args.seconds:
            file, duration = files[next(number) % len(files)]
            url = f"{server.url}/v1/audio/transcriptions"
            answer = await http.post(url, files={"file": (file.name, file.read_bytes())}, data=fields)
            if answer.status_code != 200:
                raise UserError(f"the server says: {answer.text}")
            done += 1
            seconds += duration

    async with httpx.AsyncClient(timeout=None) as http:
        await asyncio.gather(*(client(http) for _ in range(args.uploads)))
    wall = monotonic() - began
    share = (server.cpu_seconds - cpu) / wall
    return [str(args.uploads), f"{60 * done / wall:.0f}", f"{seconds / wall:.0f}", f"{share:.2f}"]


if __name__ == "__main__":
    main()
