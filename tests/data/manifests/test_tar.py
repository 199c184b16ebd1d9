"""Members of tar files."""

import pytest

from speechllm.data.audio import UtteranceError, load_samples
from speechllm.data.manifests.manifest import ManifestError, read_manifest
from speechllm.data.manifests.tar import read_member, scan_tar
from tests.data.corpora import write_corpus, write_kind, write_tar


def test_members_are_read_from_where_they_are(tmp_path):
    # the longer names need headers of their own
    members = {f"folder/{'n' * i}": bytes([i]) * (i * 37) for i in range(1, 200)}
    path = write_tar(tmp_path / "a.tar", members)
    assert {member["name"]: read_member(member) for member in scan_tar(str(path))} == members


def test_no_tar_file(tmp_path):
    with pytest.raises(ManifestError, match=r"gone\.tar: not a whole"):
        list(scan_tar(str(tmp_path / "gone.tar")))


@pytest.mark.parametrize("kind", ["tarred", "shar"])
def test_a_tar_file_that_has_changed_since_is_unreadable_audio(kind, tmp_path):
    source = write_kind(kind, tmp_path, write_corpus(tmp_path))
    cut = list(read_manifest(source))[0]
    (tar, *_) = sorted(tmp_path.rglob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(UtteranceError, match="ends inside"):
        load_samples(cut)
    tar.unlink()
    with pytest.raises(UtteranceError, match="No such file"):
        load_samples(cut)
