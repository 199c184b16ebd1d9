"""Audio and manifests at URLs, of servers on this machine; no connection, and what is not installed."""

import gzip
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from speechllm.data import DataConfig, DataError, ManifestError, SourceConfig, build_train_loader, read_manifest
from speechllm.data.audio import load_samples
from speechllm.data.audio_file import UtteranceError
from speechllm.data.index import open_index
from speechllm.data.manifests import remote
from speechllm.data.manifests.manifest import describe_cut
from speechllm.transcribe.inputs import Inputs
from tests.data.conftest import write_manifest
from tests.data.corpora import streamed, true_cuts, write_corpus, write_form

AUDIO = "wav/speaker0/u.2.wav"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send_head(self):
        self.server.asked.append(self.path)
        if self.server.breaks:  # as a network does
            self.server.breaks -= 1
            self.close_connection = True
            return None
        if self.server.busy:
            self.server.busy -= 1
            return self.send_error(503)
        return super().send_head()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of `tmp_path`, also as the only server of S3, of which a folder is a bucket."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    server.asked, server.breaks, server.busy = [], 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setattr(remote, "_WAIT_SECONDS", 0.0)
    forget()
    yield server
    server.shutdown()
    server.server_close()
    forget()


def forget():
    remote.local_copy.cache_clear()
    remote._client.cache_clear()


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "bucket").mkdir()
    return write_corpus(tmp_path / "bucket")


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize("manifest", ["here", "there", "there, gz", "WeNet"])
def test_the_utterances_are_those_of_the_files(scheme, manifest, server, lines, tmp_path):
    folder = f"{server.url}/bucket" if scheme == "http" else "s3://bucket"
    written = [{name: x for name, x in line.items() if name != "duration" or manifest == "here"} for line in lines]
    if manifest == "here":
        written = [line | {"audio_filepath": f"{folder}/{line['audio_filepath']}"} for line in written]
        path = str(write_manifest(tmp_path / "m.jsonl", written))
    elif manifest == "WeNet":
        write_form("WeNet", tmp_path / "bucket", written)
        path = f"{folder}/data.list"
    else:
        name = "m.jsonl.gz" if "gz" in manifest else "m.jsonl"
        file = write_manifest(tmp_path / "bucket" / name, written)
        if "gz" in manifest:
            file.write_bytes(gzip.compress(file.read_bytes()))
        path = f"{folder}/{name}"
    source = SourceConfig(path, lang="en")
    index = open_index(source)
    cuts = [index.cut(i) for i in range(len(index))]
    for found in (cuts, list(read_manifest(source)), streamed(source)[0]):
        for cut, line, true in zip(found, lines, true_cuts(tmp_path / "bucket", lines), strict=True):
            entry = describe_cut(cut)
            assert (entry.id, entry.text, round(entry.duration, 3)) == (
                line["id"],
                line["text"].strip(),
                line["duration"],
            )
            assert np.array_equal(load_samples(cut), load_samples(true))


@pytest.fixture
def source(server, lines, tmp_path):
    write_manifest(tmp_path / "bucket/m.jsonl", lines)
    return SourceConfig(f"{server.url}/bucket/m.jsonl")


@pytest.fixture
def unreachable(server):
    """Closes the server."""

    def close():
        forget()
        server.breaks = 1000

    return close


def test_training_reads_urls_and_resumes(source, tmp_path):
    data = DataConfig(train=[source], max_duration=1.0, num_buckets=1, num_workers=2)
    loader = build_train_loader(data, seed=1)
    whole = [batch.ids for batch in loader]
    state = None
    for number, _ in enumerate(loader):
        if number == 1:
            state = loader.state_dict()
            break
    resumed = build_train_loader(data, seed=1)
    resumed.load_state_dict(state)
    assert [batch.ids for batch in resumed] == whole[2:] and not loader.skipped


def test_a_connection_that_breaks_is_tried_again(source, server):
    server.breaks = 2
    cut = next(iter(read_manifest(source)))
    server.breaks = 2
    assert len(load_samples(cut)) == 4800


def test_a_server_that_is_busy_is_asked_again_and_drops_no_line(server, lines, tmp_path):
    written = [{"audio_filepath": f"{server.url}/bucket/{AUDIO}", "text": "x"}]
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", written)))
    server.busy = 3
    with pytest.raises(DataError, match="no index can be made of it: .*busy.*503"):
        open_index(source)
    server.busy = 2
    assert len(open_index(source)) == 1


def test_a_manifest_at_a_url_is_transcribed(source, lines, tmp_path):
    found = list(Inputs([source.path]))
    assert [input.text for input in found] == [line["text"].strip() for line in lines]
    true = load_samples(true_cuts(tmp_path / "bucket", lines)[2])
    assert np.array_equal(np.concatenate(list(found[2].blocks([]))), true)


def test_paths_in_a_manifest_at_a_url_are_beside_it(source, lines, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    write_corpus(tmp_path / "here", count=1)
    monkeypatch.chdir(tmp_path / "here")
    assert [cut.recording.sources[0].type for cut in read_manifest(source)] == ["url"] * len(lines)


def test_a_scheme_that_nothing_opens_is_named():
    with pytest.raises(DataError, match="htps://host/m.jsonl: Unable to handle scheme 'htps'"):
        read_manifest("htps://host/m.jsonl")


def test_without_a_connection_an_utterance_is_left_out(source, unreachable):
    cut = next(iter(read_manifest(source)))
    unreachable()
    with pytest.raises(UtteranceError, match="unreadable audio: .*no connection to 127.0.0.1:.*; is there a network"):
        load_samples(cut)


def test_without_a_connection_no_index_is_made(server, unreachable, tmp_path):
    lines = [{"audio_filepath": f"{server.url}/{name}.wav", "text": "x"} for name in "ab"]
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))
    unreachable()
    with pytest.raises(DataError, match="m.jsonl: no index can be made of it: .*no connection to"):
        open_index(source)
    cuts, errors = streamed(source)
    assert not cuts and len(errors) == 2  # as of lines whose audio is missing
    assert all("no connection to" in str(input.error) for input in Inputs([source.path]))


def test_what_a_server_does_not_have_is_a_bad_line(server, lines, tmp_path):
    written = [{"audio_filepath": f"{server.url}/bucket/{name}", "text": "x"} for name in ("no.wav", AUDIO)]
    index = open_index(SourceConfig(str(write_manifest(tmp_path / "m.jsonl", written))))
    assert len(index) == 1 and "m.jsonl:1: " in index.bad_lines.messages[0] and "404" in index.bad_lines.messages[0]
    with pytest.raises(ManifestError, match="no.tsv: .*404"):
        read_manifest(f"{server.url}/bucket/no.tsv")


def test_the_copy_of_a_manifest_follows_it_and_stays_where_it_does_not_change(
    source, lines, unreachable, tmp_path, caplog
):
    first = open_index(source)
    forget()
    assert open_index(source)._folder == first._folder
    write_manifest(tmp_path / "bucket/m.jsonl", lines[:3])
    forget()
    assert len(open_index(source)) == 3
    unreachable()
    assert len(open_index(source)) == 3 and "what was read last time is taken" in caplog.text
    with pytest.raises(ManifestError, match="no connection to"):
        read_manifest(f"{source.path}.gz")


def test_parts_of_a_recording_are_fetched_once(server, lines, tmp_path, monkeypatch):
    written = [{"audio_filepath": f"{server.url}/bucket/{AUDIO}", "offset": i / 10, "duration": 0.1} for i in range(4)]
    cuts = list(read_manifest(write_manifest(tmp_path / "m.jsonl", written)))
    whole = load_samples(true_cuts(tmp_path / "bucket", lines)[2])
    server.asked.clear()
    assert np.array_equal(np.concatenate([load_samples(cut) for cut in cuts]), whole[:6400])
    assert len(server.asked) == 1


@pytest.mark.parametrize(("module", "path"), [("smart_open", "m.jsonl"), ("boto3.session", "s3://bucket/m.jsonl")])
def test_what_is_not_installed_is_named(module, path, server, lines, tmp_path, monkeypatch):
    written = [{"audio_filepath": f"s3://bucket/{AUDIO}", "duration": 0.5}]
    write_manifest(tmp_path / "m.jsonl", written)
    monkeypatch.setitem(sys.modules, module, None)
    path = path if "://" in path else str(tmp_path / path)
    with pytest.raises(DataError, match=r"pip install 'speechllm\[remote\]'"):
        load_samples(next(iter(read_manifest(path))))


@pytest.mark.parametrize("path", ["https://host/rows.parquet", "s3://bucket/rows.arrow", "https://host/a.tar"])
def test_parquet_and_webdataset_at_urls_is_refused(path):
    with pytest.raises(ManifestError, match="read from disk; download "):
        read_manifest(path)
