"""Audio and features inside tar files, Arrow files and Parquet files: where they are, and reading them from there."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import TypedDict, final

from lhotse import AudioSource, Recording, fastcopy
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.shar.utils import fill_shar_placeholder

from speechllm.data.manifests.row_groups import read_row
from speechllm.data.manifests.source import ManifestError

# Custom field of cuts whose audio or features are inside of other files: {"recording": Member, "features": Member}.
TAR = "tar"


@final
class Member(TypedDict):
    """Where the data of a member begin in the tar or Arrow file `path`, and how many bytes they have."""

    path: str
    name: str
    offset: int
    size: int


@final
class RowMember(TypedDict):
    """The row of a row group in the Parquet file `path`, and the column of it that has the audio."""

    path: str
    name: str
    row_group: int
    row: int
    column: str


def forget_members(tar: tarfile.TarFile) -> None:
    """Else an open tar file remembers all members that it has come by."""
    tar.members.clear()  # type: ignore[attr-defined]  # typeshed does not list it


def scan_tar(path: str) -> Iterator[Member]:
    """The files in an uncompressed tar file, from its headers alone.

    Raises:
        ManifestError: it is missing, damaged or compressed; after the members before the damage.
    """
    try:
        whole = os.path.getsize(path)
        with tarfile.open(path, mode="r:") as tar:
            while (member := tar.next()) is not None:
                forget_members(tar)
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                if member.isfile():
                    yield Member(path=path, name=member.name, offset=member.offset_data, size=member.size)
    except (OSError, tarfile.TarError) as error:
        raise ManifestError(f"{path}: not a whole, uncompressed tar file ({error})") from error


def read_member(member: Member | RowMember) -> bytes:
    """The data of a member.

    Raises:
        OSError: the file is missing, ends too early or cannot be read.
    """
    if "row_group" in member:
        return read_row(member["path"], member["row_group"], member["row"], member["column"])
    with open(member["path"], "rb") as file:
        data = os.pread(file.fileno(), member["size"], member["offset"])
    if len(data) < member["size"]:
        raise OSError(f"{member['path']} ends inside {member['name']}: it has changed, or was not copied to its end")
    return data


def with_tar_data(cut: Cut) -> Cut:
    """The cut with its audio and features in memory, if they are inside of other files; else the cut itself.

    Raises:
        OSError: as of `read_member`.
    """
    members = (cut.custom or {}).get(TAR) if isinstance(cut, DataCut) else None
    if members is None:
        return cut
    loaded = {}
    if "recording" in members:
        loaded["recording"] = in_memory(cut.recording, read_member(members["recording"]))
    if "features" in members:
        features = fastcopy(cut.features)
        fill_shar_placeholder(features, read_member(members["features"]), members["features"]["name"])
        loaded["features"] = features
    custom = {name: value for name, value in cut.custom.items() if name != TAR}
    return fastcopy(cut, **loaded, custom=custom or None)


def in_memory(recording: Recording, data: bytes) -> Recording:
    """The recording with the contents of its audio file."""
    (source,) = recording.sources
    return fastcopy(recording, sources=[AudioSource(type="memory", channels=source.channels, source=data)])
