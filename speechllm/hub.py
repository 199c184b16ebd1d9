"""The Hugging Face Hub: everywhere a folder or file of a model is taken, so is its id there.

    OWNER/NAME                     the newest version
    OWNER/NAME@REVISION            a branch, tag or commit
    OWNER/NAME[@REVISION]/FILE     one file of it, such as an official RWKV-7 .pth

`hf://` may stand in front. What is on this machine counts first: a name whose first part is a folder here is a path.
Files are in huggingface_hub's cache (`HF_HOME`), which is all that is needed without a network (`HF_HUB_OFFLINE=1`);
`HF_TOKEN` or `hf auth login` opens what is private or gated, and `HF_ENDPOINT` names another server.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from speechllm.errors import UserError

logger = logging.getLogger(__name__)

# The Hub's conversions of data sets, and pull requests, are revisions with a slash.
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@(refs/convert/[\w.-]+|refs/pr/\d+|[\w.-]+))?(?:/(.+))?")
_EXPLICIT = re.compile(r"hf:/+")  # a Path has one slash of two left
# As in train-00000-of-00010.parquet.
_SHARD = re.compile(r"(.*-)(\d+)(-of-(\d+)\..*)")
# What ends so is the name of a file, not of a repository.
_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".gguf", ".model", ".json", ".yaml", ".yml", ".txt")
# Weights in forms that nothing here reads, or reads as single files only.
_OTHER_WEIGHTS = (".onnx", ".ort", ".h5", ".msgpack", ".ot", ".tflite", ".gguf", ".nemo", ".mlmodel", ".rknn", ".npz")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Of the pickled weights, those that are found by their name in a folder.
_KNOWN = ("pretrained.pt", "model.pt", "pytorch_model.bin")
_CONNECTION_SECONDS = 5.0
# What is looked for where the Hub cannot be asked which files there are.
_CONFIGURATIONS = ["config.json", "config.yaml", "adapter_config.json"]


class HubId(NamedTuple):
    """What is named on the Hub; `revision` None: the newest; `file` None: the files of a model as a folder."""

    repo: str
    revision: str | None
    file: str | None


def hub_id(source: str | os.PathLike) -> HubId | None:
    """What a name means on the Hub; None if it is a path of this machine, whether something is there or not."""
    text = os.fspath(source)
    explicit = _EXPLICIT.match(text)
    found = _ID.fullmatch(text[explicit.end() :] if explicit else text)
    if found is None:
        return None
    repo, revision, file = found.groups()
    if explicit is None:
        owner, name = repo.split("/")
        is_path = owner in (".", "..", "~") or os.path.lexists(owner) or os.path.lexists(text)
        if is_path or (file is None and name.lower().endswith(_FILE_SUFFIXES)):
            return None
    return HubId(repo, revision, file)


def local_path(source: str | os.PathLike) -> Path:
    """Where the files of a path or Hub id are on this machine; they are downloaded if they are not.

    Raises:
        FileNotFoundError: the Hub does not have them, or cannot be reached and they are not in the cache.
        UserError: the repository holds several checkpoints, and no FILE is named.
    """
    found = hub_id(source)
    return Path(source) if found is None else _downloaded(found)


@functools.cache
def _downloaded(id: HubId) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    with _explained(id):
        names = _file_names(id)
        where: dict[str, Any] = {"revision": id.revision, "local_files_only": names is None}
        if id.file is None:
            files = _CONFIGURATIONS if names is None else wanted(names, id.repo)
            return Path(snapshot_download(id.repo, allow_patterns=files, **where))
        sizes = str(PurePosixPath(id.file).with_name("config.json"))  # of an encoder, beside its weights
        if names is None or sizes in names:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(id.repo, sizes, **where)
        return Path(hf_hub_download(id.repo, id.file, **where))


def dataset_files(id: HubId, choose: Callable[[Sequence[str]], Sequence[str]]) -> list[Path]:
    """Files of a data set, where they are on this machine; they are downloaded if they are not.

    Args:
        choose: those that are wanted, of the names of all that there are.

    Raises:
        FileNotFoundError: the Hub does not have them, or cannot be reached and they are not in the cache.
        UserError: that `choose` raises.
    """
    from huggingface_hub import snapshot_download

    with _explained(id):
        names = _file_names(id, "dataset")
        where: dict[str, Any] = {"revision": id.revision, "repo_type": "dataset"}
        if names is None:
            # with no file asked for: else it refuses where a part of the data set was downloaded
            folder = Path(snapshot_download(id.repo, allow_patterns=[], local_files_only=True, **where))
            cached = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            chosen = choose(_with_other_shards(cached))
        else:
            chosen = choose(names)
            folder = Path(snapshot_download(id.repo, allow_patterns=[glob.escape(name) for name in chosen], **where))
    missing = next((name for name in chosen if not (folder / name).is_file()), None)
    if missing is not None:
        raise _not_there(id, f"the Hub cannot be reached, and {missing} is not in the cache")
    return [folder / name for name in chosen]


def _with_other_shards(names: Sequence[str]) -> list[str]:
    """The names of files, and of all shards that they say there are: a cache may have some of them only."""
    found = set(names)
    shards = filter(None, map(_SHARD.fullmatch, names))
    for begin, width, end, count in {(shard[1], len(shard[2]), shard[3], int(shard[4])) for shard in shards}:
        found.update(f"{begin}{i:0{width}}{end}" for i in range(count))
    return sorted(found)


@contextlib.contextmanager
def _explained(id: HubId) -> Iterator[None]:
    """What huggingface_hub raises in between is a `FileNotFoundError` in a sentence."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise _not_there(
            id, "the Hub cannot be reached, and it is not in the cache; with a network it is downloaded once"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the exceptions of its HTTP client differ from version to version
        raise _not_there(id, _reason(error)) from error


def _not_there(id: HubId, reason: str) -> FileNotFoundError:
    name = f"{id.repo}{'' if id.revision is None else f'@{id.revision}'}{'' if id.file is None else f'/{id.file}'}"
    return FileNotFoundError(f"{name}: is no path here; as an id of the Hugging Face Hub: {reason}")


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "its license must be accepted on its page there, and HF_TOKEN or `hf auth login` say who you are"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: HF_TOKEN or `hf auth login` say who you are"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, EntryNotFoundError):
        return "it has no such file"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return "you may not: HF_TOKEN or `hf auth login` say who you are, with a token that can write what you write"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _file_names(id: HubId, repo_type: str = "model") -> list[str] | None:
    """The files of a repository; None where the Hub cannot be asked: what is in the cache is there as a whole."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        _check_connection(constants.ENDPOINT)
        return HfApi().list_repo_files(id.repo, revision=id.revision, repo_type=repo_type)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # see `_explained`
        logger.warning("%s: the Hub cannot be asked (%s); what is in the cache is taken", id.repo, _reason(error))
        return None


def _check_connection(endpoint: str) -> None:
    """Whether a server is there: huggingface_hub tries for most of a minute. A proxy is asked by that alone.

    Raises:
        OSError: it is not.
    """
    address = urlsplit(endpoint)
    if not getproxies():
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=_CONNECTION_SECONDS).close()


def wanted(names: Sequence[str], repo: str) -> list[str]:
    """Of the files of a repository, those that make up a model's folder.

    Raises:
        UserError: there are several checkpoints, of which one must be chosen.
    """
    kept = [name for name in names if not name.lower().endswith(_OTHER_WEIGHTS) and not name.startswith(".")]
    pickled = [name for name in kept if name.lower().endswith(_PICKLED)]
    if any(name.endswith(".safetensors") for name in kept):
        return [name for name in kept if name not in pickled]
    known = [name for name in pickled if PurePosixPath(name).name in _KNOWN]
    if not known and len(pickled) > 1:
        raise UserError(
            f"{repo}: holds {len(pickled)} checkpoints; name one of them, such as {repo}/{pickled[0]}: "
            f"{', '.join(pickled[:8])}{', ...' if len(pickled) > 8 else ''}"
        )
    return [name for name in kept if name not in pickled or name in (known or pickled)]


def identity(source: str | os.PathLike) -> str | None:
    """A text that says which version of what on the Hub is meant; None of a path."""
    id = hub_id(source)
    if id is None:
        return None
    snapshot = _downloaded(id)
    for _ in PurePosixPath(id.file or "").parts:
        snapshot = snapshot.parent
    return f"{id.repo}@{snapshot.name}/{id.file or ''}"


def push_folder(folder: str | os.PathLike, repo: str, private: bool | None = None) -> str:
    """Upload the files of a folder to the Hub as one commit; the repository is made if it is not there.

    Args:
        repo: `OWNER/NAME`, or `OWNER/NAME@BRANCH` for another branch than the main one.
        private: whether a new repository is; None: as the account has it by default.

    Returns:
        The address of the commit.

    Raises:
        UserError: it is no such name, or the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    found = _ID.fullmatch(_EXPLICIT.sub("", repo, count=1))
    if found is None or found[3] is not None:
        raise UserError(f"{repo}: not a name on the Hugging Face Hub; expected OWNER/NAME or OWNER/NAME@BRANCH")
    name, branch, _ = found.groups()
    api = HfApi()
    try:
        _check_connection(constants.ENDPOINT)
        api.create_repo(name, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=Path(folder), revision=branch).commit_url)
    except Exception as error:  # see `_explained`
        raise UserError(f"{repo}: cannot be pushed to the Hugging Face Hub: {_reason(error)}") from error
