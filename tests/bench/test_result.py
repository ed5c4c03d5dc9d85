"""Results of the suite: what is written can be read again, and nothing else is taken for one."""

import json
import re

import pytest

from tests.bench.commands import ran
from wantrt.bench import latency
from wantrt.bench.result import Table, finite, load, number, run, spread, start, text, told_command
from wantrt.cli.console import Console
from wantrt.errors import BenchError

TABLE = Table((("what", text("name")), ("ms", number("step_s", 1, scale=1e3))))


@pytest.fixture
def console():
    return Console(as_json=False, quiet=False)


def rows(fails: BaseException | None = None):
    yield {"name": "first", "step_s": spread([0.1, 0.2, 0.3])}
    if fails:
        raise fails
    yield {"name": "second", "step_s": float("nan")}


def test_is_written_shown_and_read_again(console, tmp_path, capsys):
    result = start("latency", {"size": (64, 64), "steps": 2}, note="alone")
    assert run(console, result, rows(), TABLE, tmp_path) == 0
    path = tmp_path / "latency.json"
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1]) == json.loads(path.read_text())
    assert str(path) in shown
    assert any(re.search(r"first\W+200\.0", line) for line in shown)
    again = load(path)
    assert again.partial is None
    assert again.rows[1]["step_s"] is None  # JSON has no NaN
    assert again.as_dict() == result.as_dict()
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_measured_before_an_interruption_is_kept(console, tmp_path, capsys):
    result = start("latency", {})
    with pytest.raises(KeyboardInterrupt):
        run(console, result, rows(KeyboardInterrupt()), TABLE, tmp_path)
    kept = load(tmp_path / "latency.json")
    assert [row["name"] for row in kept.rows] == ["first"]
    assert kept.partial == "KeyboardInterrupt: interrupted"
    assert "partial" in capsys.readouterr().err


def test_nothing_measured_leaves_no_file(console, tmp_path):
    def none():
        raise BenchError("no such size")
        yield

    with pytest.raises(BenchError):
        run(console, start("latency", {}), none(), TABLE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_equal_settings_have_equal_hashes():
    one, same = (start("latency", {"steps": 2, "size": size}) for size in ((64, 64), [64, 64]))
    assert one.config_hash == same.config_hash
    assert one.config_hash != start("latency", {"steps": 3, "size": (64, 64)}).config_hash
    assert one.config_hash != start("vae", {"steps": 2, "size": (64, 64)}).config_hash


@pytest.mark.parametrize(
    "change, said",
    [
        ({"schema": 0}, "of schema 0, not 1; measure again"),
        ({"schema": None}, "no result of the suite"),
        ({"rows": [{"step_s": 1}]}, "a row has no name"),
        ({"rows": "none"}, "'rows' is no list"),
        ({"settings": {"steps": 3}}, "was altered"),
        ({"colour": "red"}, "is damaged"),
    ],
    ids=str,
)
def test_what_is_no_result_is_refused(console, tmp_path, change, said, capsys):
    run(console, start("latency", {"steps": 2}), rows(), TABLE, tmp_path)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BenchError, match=said) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_what_is_no_object_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"x\.json is no"):
        load(path)


def test_spread():
    found = spread([3.0, 1.0, 2.0])
    assert (found["median"], found["min"], found["max"], found["runs"]) == (2.0, 1.0, 3.0, 3)
    assert found["min"] <= found["p10"] <= found["p90"] <= found["p99"] <= found["max"]


def test_a_command_can_be_typed_again(monkeypatch):
    given = [
        "wantrt",
        "bench",
        "vae",
        "--out",
        "--x",
        "--size",
        "64x64",
        "--note=a b",
        "--runs",
        "2",
    ]
    monkeypatch.setattr("sys.argv", given)
    assert told_command().endswith("bench vae --size 64x64 --runs 2")


def test_tables():
    assert TABLE.markdown([{"name": "a", "step_s": 0.5}, {"name": "b"}]).splitlines()[2:] == [
        "| a | 500.0 |",
        "| b |  |",
    ]
    assert finite({"x": (1, float("inf")), 2: object}) == {"x": [1, None], "2": str(object)}


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(latency, "choose_bundle", lambda *_, **__: pytest.fail("went on"))
    assert ran("latency", "--out", tmp_path / "file" / "below") == 2
    assert re.search(r"cannot write into .*name another --out", capsys.readouterr().err)


def test_columns_that_say_nothing_are_left_out():
    table = Table((("a", number("a")), ("b", number("b")), ("c", text("c"))))
    rows = [{"a": 1.0}, {"c": "x"}]
    assert [title for title, _ in table.used(rows).columns] == ["a", "c"]
