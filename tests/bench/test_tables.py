"""Tables of results in Markdown, and the marked sections of a README."""

from dataclasses import replace

import pytest

from tests.bench.samples import sample, samples
from wantrt.bench.result import Table, number, text
from wantrt.bench.tables import choose, fill, lines, load_all, markdown, rewrite, table_of
from wantrt.errors import BenchError

README = """# A thing

Before. <!-- a comment -->

<!-- bench:compare: engine, seconds -->
stale
<!-- /bench -->

Between.

<!-- bench:h200/compare -->
<!-- /bench -->
After.
"""


def compared():
    """As of a command that has no table of its own."""
    return replace(samples()["compare"], name="sample")


def results():
    return {"compare": compared(), "h200/compare": compared()}


def test_sections_hold_their_tables():
    filled = fill(README, results(), "bench/results")
    assert "stale" not in filled
    assert "| engine | seconds |\n| --- | ---: |\n| wantrt | 1.40 s |" in filled
    assert "[compare.json](bench/results/h200/compare.json)" in filled
    assert "`wantrt bench compare --seed 0`" in filled
    assert "2001-02-03" in filled
    for kept in ("Before. <!-- a comment -->", "Between.", "After.\n"):
        assert kept in filled


def test_filling_again_changes_nothing():
    filled = fill(README, results(), "bench/results")
    assert fill(filled, results(), "bench/results") == filled


def test_a_number_that_was_altered_is_found():
    filled = fill(README, results(), "bench/results")
    assert fill(filled.replace("1.40 s", "1.30 s"), results(), "bench/results") == filled


@pytest.mark.parametrize(
    "content, said",
    [
        ("<!-- bench:latency -->\n<!-- /bench -->", "bench:latency has no result; there are compa"),
        ("<!-- bench:compare: what -->\n<!-- /bench -->", "no column 'what'; there are name,"),
        ("<!-- bench:compare[none] -->\n<!-- /bench -->", "no row has 'none' in its first"),
        ("<!-- bench:compare -->\n", "has no <!-- /bench -->"),
        ("<!-- /bench -->\n<!-- bench:compare -->", "or the other way round"),
        ("<!-- bench:compare -->\n<!-- bench:compare -->\n", "or the other way round"),
        ("<!-- bench:com pare -->\n<!-- /bench -->", "not of the form"),
        ("<!-- bench:compare --> <!-- /bench -->", "not of the form"),
    ],
)
def test_bad_sections_are_refused(content, said):
    with pytest.raises(BenchError, match=said):
        fill(content, results(), "results")


def test_rewriting_a_file(tmp_path):
    for folder in ("", "h200"):
        written = compared().write(tmp_path / "bench" / "results" / folder)
        written.rename(written.with_name("compare.json"))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    folder = tmp_path / "bench" / "results"
    found = load_all([folder])
    assert rewrite(readme, found, folder)
    assert not rewrite(readme, found, folder)
    assert "(bench/results/compare.json)" in readme.read_text()


def test_two_folders_with_one_name_are_both_shown(tmp_path):
    for name in ("a", "b"):
        compared().write(tmp_path / name)
    assert len(load_all([tmp_path / "a", tmp_path / "b"])) == 2


def test_rows_are_chosen_by_their_names():
    two = sample("later", [{"name": "a: first", "x": 1}, {"name": "a: again", "x": 2}])
    filled = fill("<!-- bench:later[first]: name, x -->\n<!-- /bench -->", {"later": two}, "r")
    assert "| a: first | 1.00 |" in filled
    assert "again" not in filled


def test_columns_are_chosen_in_order():
    table = Table((("x", text("name")), ("p90", number("a")), ("p90", number("b"))))
    chosen = choose(table, ["p90", "x"], "here")
    assert chosen.lines([{"name": "n", "a": 1.0, "b": 2.0}]) == [["1.00", "n"]]


def test_what_has_no_table_is_shown_as_it_is():
    row = {"name": "x", "peak_rss_bytes": 2**31, "passed": True, "why": None}
    table = table_of(sample("no_such_command", [row, {"name": "y", "e2e_s": 2.5}]))
    assert [title for title, _ in table.columns] == [*row, "e2e_s"]
    assert table.lines([row]) == [["x", "2.00 GiB", "True", "", ""]]


def test_notes_and_partial_results_are_said():
    told = markdown(sample("later", [{"name": "x"}], note="beside a test", partial="Boom: x"))
    assert "; beside a test" in told
    assert "**Partial** (Boom: x)." in told


def test_rows_that_a_table_cannot_show_are_refused():
    result = sample("no_such_command", [{"name": "x", "e2e_s": 1.0}])
    table = Table((("x", lambda row: row["gone"]),))
    with pytest.raises(BenchError, match="measure again with: wantrt bench no_such_command"):
        lines(result, table)
