"""Files and folders that appear whole or not at all."""

import pytest

from speechllm.files import replaced_file, replaced_folder


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


def test_leftovers_of_a_killed_run_are_cleaned_up(tmp_path):
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp/half").write_text("")
    with replaced_folder(tmp_path / "model") as tmp:
        (tmp / "whole").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "whole"]
