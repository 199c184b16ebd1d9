from speechllm.model.card import add_results


def test_results_are_added_and_replaced(tmp_path):
    (tmp_path / "README.md").write_text("# Card\n")
    add_results(tmp_path, "\ntest  1.00\n")
    add_results(tmp_path, "\ntest  2.00\n")
    assert (tmp_path / "README.md").read_text() == "# Card\n\n## Results\n\n```\ntest  2.00\n```\n"
    add_results(tmp_path / "of another tool", "table")
    assert "table" in (tmp_path / "of another tool" / "README.md").read_text()
