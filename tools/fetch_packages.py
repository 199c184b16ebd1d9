#!/usr/bin/env python3
"""Fetch packages for the data in them, and unpack them into a folder; nothing is installed, and root is not needed.

    tools/fetch_packages.py debian packages flight-of-the-amazon-queen pocketsphinx-testdata
    tools/fetch_packages.py pypi packages recipes/english/parts.txt

A Debian package becomes FOLDER/NAME, fetched by apt-get, which checks it against its signed lists, and unpacked by
dpkg-deb. Python packages, named in a file of requirements with a hash each (`NAME==VERSION --hash=sha256:...`), become
FOLDER/NAME too, fetched and checked by pip, without what they depend on. A folder that is there is complete, and kept.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from speechllm.errors import UserError
from speechllm.files import replaced_folder

# What apt-get says where it has no list of packages, or an old one.
_UNKNOWN_PACKAGE = re.compile("Unable to locate package|No packages found|Can't find a source|404")
_REQUIREMENT = re.compile(r"([\w.-]+)==[^\s;]+(\s+--hash=sha256:[0-9a-f]{64})+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    debian = commands.add_parser("debian", help="packages of Debian or Ubuntu")
    debian.add_argument("folder", type=Path, metavar="FOLDER")
    debian.add_argument("names", nargs="+", metavar="NAME")
    pypi = commands.add_parser("pypi", help="wheels of the Python package index")
    pypi.add_argument("folder", type=Path, metavar="FOLDER")
    pypi.add_argument("requirements", type=Path, metavar="FILE", help="NAME==VERSION --hash=sha256:... in each line")
    args = parser.parse_args()
    try:
        if args.command == "debian":
            fetch_debian(args.folder, args.names)
        else:
            fetch_pypi(args.folder, args.requirements)
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
    lines = {}
    for number, line in enumerate(requirements.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            match = _REQUIREMENT.fullmatch(line.strip())
            if match is None:
                raise UserError(
                    f"{requirements}, line {number}: expected NAME==VERSION --hash=sha256:..., got {line!r}"
                )
            lines[match[1]] = line

    def fetch(name: str, target: Path) -> None:
        (target / "requirement.txt").write_text(lines[name])
        options = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", "requirement.txt")
        run(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", *options, folder=target)
        (wheel,) = target.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        wheel.unlink()

    fetch_missing(folder, list(lines), fetch)


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
