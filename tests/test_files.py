"""Files and folders that appear whole or not at all."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from speechllm.files import describe_write_error, replaced_file, replaced_folder


def test_replaced_folder(tmp_path):
    target = tmp_path / "model"
    for text in ("old", "new"):
        with replaced_folder(target) as tmp:
            (tmp / "file").write_text(text)
    with pytest.raises(KeyError), replaced_folder(target) as tmp:
        (tmp / "file").write_text("broken")
        raise KeyError
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_programs_stay_programs_and_links_links(tmp_path):
    """Debian's packages have both, links to other packages' files too."""
    with replaced_folder(tmp_path / "package") as tmp:
        program = tmp / "usr/bin/program"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        (tmp / "text").write_text("")
        (tmp / "link").symlink_to("not-there")
    assert os.access(tmp_path / "package/usr/bin/program", os.X_OK)
    assert not (tmp_path / "package/text").stat().st_mode & 0o111
    assert os.readlink(tmp_path / "package/link") == "not-there"


def test_replaced_file(tmp_path):
    target = tmp_path / "new" / "file"
    for text in ("old", "new"):
        with replaced_file(target) as tmp:
            tmp.write_text(text)
    with pytest.raises(KeyError), replaced_file(target) as tmp:
        tmp.write_text("broken")
        raise KeyError
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_files_that_are_written_at_the_same_time_are_whole(tmp_path):
    with replaced_file(tmp_path / "a") as one, replaced_file(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("the other")
    assert (tmp_path / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["n" * 255, "\u00fc" * 127, os.fsdecode(b"\xff" * 255)])
def test_the_longest_names_can_be_written(tmp_path, name):
    with replaced_file(tmp_path / name) as tmp:
        tmp.write_text("text")
    assert (tmp_path / name).read_text() == "text"


def test_leftovers_of_a_killed_run_are_cleaned_up(tmp_path):
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp/half").write_text("")
    with replaced_folder(tmp_path / "model") as tmp:
        (tmp / "whole").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "whole"]


def test_others_can_read_what_was_written(tmp_path):
    umask = os.umask(0o027)
    try:
        with replaced_file(tmp_path / "file.safetensors") as tmp:
            save_file({"x": torch.zeros(1)}, tmp)
        with replaced_folder(tmp_path / "folder") as tmp:
            save_file({"x": torch.zeros(1)}, tmp / "file.safetensors")
    finally:
        os.umask(umask)
    for path in (tmp_path / "file.safetensors", tmp_path / "folder/file.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["file", "no/such/folder/file"])
def test_write_errors_name_path_reason_and_free_space(tmp_path, name):
    path = tmp_path / name
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    text = describe_write_error(path, error)
    assert text.startswith(f"{path}: cannot be written: {os.strerror(errno.ENOSPC)} (")
    assert text.endswith(" GB free there)")
    assert "IoError" in describe_write_error(path, ValueError("IoError"))
