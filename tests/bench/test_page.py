"""The page of results: whole by itself, every number findable, no result taken for HTML."""

import re
import sys
from html.parser import HTMLParser

import pytest

from tests.bench.samples import around, latency_row, sample, samples
from wantrt.bench.figures import FIGURES, figures, labels
from wantrt.bench.page import page, section, told_settings
from wantrt.bench.plots import Axis, Bar, Part, Series, bars, plot, quantity
from wantrt.bench.tables import plain_table
from wantrt.cli import main
from wantrt.cli.bench import COMMANDS

VOID = {"meta", "br"}


@pytest.fixture(autouse=True)
def plain_tables(monkeypatch):
    """The invented rows do not have all that the commands' own tables take."""
    for module in ("page", "tables"):
        monkeypatch.setattr(f"wantrt.bench.{module}.table_of", plain_table)


class Reader(HTMLParser):
    """Every tag with its attributes; refuses what is not closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def percents(markup: str, attribute: str) -> list[float]:
    return [float(found) for found in re.findall(rf'\b{attribute}="(-?[\d.]+)%"', markup)]


def test_needs_nothing_but_itself():
    read = Reader(page(samples()))
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attributes in read.tags:
        assert not attributes.keys() & {"src", "srcset", "style", "onclick", "onload"}
        assert (attributes.get("href") or "#").startswith("#")
    css = page(samples()).partition("<style>")[2]
    css = css.partition("</style>")[0]
    assert "url(" not in css
    assert "@import" not in css
    assert "prefers-color-scheme: dark" in css
    assert "max-width: 760px" in css


def test_every_colour_is_defined_for_light_and_dark():
    content = page(samples())
    used = set(re.findall(r'class="(?:[a-z]+ )?(c\d)', content))
    assert used >= {"c1", "c2", "c3"}
    for colour in used:
        assert content.count(f"--{colour}: #") == 2


def test_links_lead_to_sections():
    read = Reader(page(samples()))
    places = {attributes.get("id") for _, attributes in read.tags} - {None}
    links = {(a["href"] or "")[1:] for tag, a in read.tags if tag == "a"}
    assert places == links == set(samples())


def test_commands_have_their_order():
    shown = {"14b/build": sample("build", []), "b/latency": sample("latency", [])}
    shown |= {"a/latency": sample("latency", [{"name": "x", "e2e_s": 1.0}])}
    places = re.findall(r'<section id="([^"]*)"', page(shown))
    assert places == ["b/latency", "a/latency", "14b/build"]  # names are sorted where they are read


@pytest.mark.parametrize("name", samples())
def test_figures_beside_card_and_table(name):
    result = samples()[name]
    drawn = section(name, result)
    read = Reader(drawn)
    assert len(figures(result)) == drawn.count("<figure>") >= 1
    for told in (result.command, "0123456789ab", "2001-02-03", "torch 0.0.1", result.config_hash):
        assert told in read.text
    assert str(result.machine.get("gpu", result.machine["cpu"])) in read.text
    for row in result.rows:  # nothing is only in a plot
        assert row["name"] in drawn[drawn.index("<table>") :]


def test_settings_are_words():
    settings = {"precision": {"vae": "fp32"}, "runtimes": ["torch", "onnxruntime"], "size": None}
    told = told_settings(settings | {"videos": [{"seed": 0}, {"seed": 1}]})
    assert told == (
        "precision (vae fp32), runtimes (torch, onnxruntime), videos ((seed 0), (seed 1))"
    )


def test_partial_results_say_so():
    found = samples()
    assert "KeyboardInterrupt: interrupted" in section("latency", found["latency"])
    assert "Partial" not in section("compare", found["compare"])
    killed = sample("latency", [latency_row("x")], partial="running")
    assert "it still ran, or was killed" in section("latency", killed)
    content = page(found)
    assert ">latency *</a>" in content
    assert ">compare</a>" in content


def test_what_a_result_says_is_text():
    evil = "<script>alert(1)</script>\"'&"
    row = {"name": evil, "e2e_s": around(3), "text_s": 1.0, "step_ms": around(2), "psnr_db": 3.0}
    machine = samples()["latency"].machine | {"cpu": evil, "gpu": evil, "versions": {evil: evil}}
    machine["gpu_state"] = {evil: evil}
    for name in (*FIGURES, "unknown"):
        result = sample(name, [row], machine, note=evil, partial=evil, settings={evil: evil})
        content = page({evil: result})
        assert "<script" not in content
        assert evil in Reader(content).text


def test_results_of_unknown_commands_are_shown():
    row = {"name": "x", "step_ms": around(5), "floor_fraction": 0.5, "peak_rss_bytes": 2**30}
    drawn = section("later", sample("later", [row]))
    assert "Step times" in drawn
    assert "50.0%" in drawn
    assert "1.00 GiB" in drawn


def test_every_figure_of_every_command_is_left_out_without_data():
    assert set(FIGURES) == set(COMMANDS) - {"report"}
    for name in FIGURES:
        assert figures(sample(name, [])) == []
        assert figures(sample(name, [{"name": "said", "says": "peer is missing"}])) == []


def test_stages_and_what_is_between_make_the_whole():
    row = {"name": "x", "text_s": 1.0, "denoise_s": 6.0, "vae_decode_s": 2.0, "e2e_s": 10.0}
    (stages,) = figures(sample("latency", [row]))
    assert percents(stages.markup, "rect[^>]* width") == [10, 60, 20, 10]
    assert "besides: 1.00 s" in stages.markup
    assert "10.0 s" in stages.markup


def test_bars_are_in_proportion():
    rows = [Bar("a", [Part(1.0, "c1", "")], ""), Bar("b", [Part(4.0, "c1", "")], "", "", 3.0, 5.0)]
    assert percents(bars(rows), r"rect[^>]* width") == [20, 80]


def test_a_floor_is_compared_with_all_of_it():
    row = {"name": "x", "floor_fraction": 0.25, "denoise_floor_fraction": 0.5}
    (floor,) = figures(sample("vae", [row]))
    assert percents(floor.markup, "rect[^>]* width") == [25, 50]
    assert "all of it" in floor.markup


def test_parts_that_ran_at_once_are_not_stacked():
    times = {"weights_s": 1.0, "graphs_s": 2.0, "plans_s": 6.0}
    rows = [{"name": "x", "what": "first", "build_s": 5.0, **times}]
    (built,) = figures(sample("build", rows))
    assert "all of it" in built.markup
    assert "plans" not in built.markup
    rows[0]["build_s"] = 10.0
    (built,) = figures(sample("build", rows))
    assert percents(built.markup, "rect[^>]* width") == [10, 20, 60, 10]


def test_growth_is_drawn_where_tokens_differ():
    rows = [
        {"name": "a", "axis": "tokens", "tokens": 100, "step_ms": 4.0, "floor_ms": 2.0},
        {"name": "b", "axis": "tokens", "tokens": 200, "step_ms": 9.0, "floor_ms": 5.0},
        {"name": "c", "axis": "batch", "tokens": 300, "step_ms": 18.0},  # another request
    ]
    (grown,) = figures(sample("scaling", rows))
    assert grown.markup.count("<circle") == 2
    assert grown.markup.count('class="join c1"') == 1
    assert grown.markup.count('class="join c1 dashed"') == 1
    assert figures(sample("scaling", rows[1:])) == []


def test_logarithms_make_powers_lines():
    points = [(10.0, 3.0), (100.0, 300.0), (1000.0, 30000.0)]
    markup = plot([Series("x²", points, "c1")], Axis("x", log=True), Axis("y", log=True))
    xs = percents(markup, "cx")
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', markup)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.02)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert all(0 < x < 100 for x in xs)
    assert ">100</text>" in markup


@pytest.mark.parametrize("values", [(5.0,), (5.0, 5.0), (0.0, 0.0), (1e-9, 1e12), (3.0, 3.1)])
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_axes_take_what_comes(values, log):
    if log and min(values) <= 0:
        pytest.skip("has no logarithm")
    series = [Series("s", [(value, value) for value in values], "c1")]
    markup = plot(series, Axis("x", log=log), Axis("y", "y_bytes", log=log))
    assert "nan" not in markup
    assert 1 <= markup.count('class="end"') <= 8
    assert all(0 <= x <= 100 for x in percents(markup, "cx"))


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("e2e_s", 0.01234, "0.0123 s"),
        ("step_ms", 1549.2, "1,549 ms"),
        ("peak_rss_bytes", 3 * 2**29, "1.50 GiB"),
        ("bytes", 12, "12.0 B"),
        ("floor_fraction", 0.71, "71.0 %"),
        ("parity", 4e-6, "4.0e-06"),
        ("e2e_s", 0, "0 s"),
    ],
)
def test_numbers_have_their_units(key, value, told):
    assert quantity(key, value) == told


def test_rows_of_one_name_are_told_apart():
    rows = [
        {"name": "x", "runtime": "torch", "batch": 1, "e2e_s": 3.0},
        {"name": "x", "runtime": "torch", "batch": 2, "e2e_s": 4.0},
        {"name": "y", "runtime": "torch"},
    ]
    assert labels(rows) == ["x, batch 1", "x, batch 2", "y"]


# -- The command ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("latency", "compare"):
        samples()[name].write(tmp_path / "results")
    samples()["compare"].write(tmp_path / "results" / "h200")
    return tmp_path / "results"


@pytest.fixture
def report(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wantrt", "bench", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        return exited.value.code, *capsys.readouterr()

    return run


def test_report_writes_a_page(folder, tmp_path, report):
    out = tmp_path / "new" / "page.html"
    code, stdout, stderr = report(folder, "--out", out)
    assert (code, stderr) == (0, "")
    assert stdout.split() == [str(out)]
    content = out.read_text()
    for name in ("latency", "compare", "h200/compare"):
        assert f'id="{name}"' in content


def test_report_prints_tables(folder, report):
    code, stdout, _ = report(folder, "--markdown")
    assert code == 0
    assert "### h200/compare" in stdout
    assert "| --- | ---:" in stdout
    assert "**Partial** (KeyboardInterrupt: interrupted)" in stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "nowhere is not there"),
        (["empty"], "holds no results; measure with wantrt bench"),
        (["old"], "no result of the suite; measure again"),
        (["results", "--markdown", "--out", "x.html"], "take one of"),
        (["results", "old", "--readme", "README.md"], "no result of the suite"),
        (["results", "results/h200", "--readme", "README.md"], "--readme takes one folder"),
        (["results", "--readme", "README.md"], "cannot read README.md"),
    ],
)
def test_bad_input_is_one_line(folder, report, arguments, said, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("empty", "old"):
        (folder.parent / name).mkdir()
    (folder.parent / "old" / "build_plans.json").write_text('{"name": "build_plans", "runs": {}}')
    code, stdout, stderr = report(*arguments)
    assert (code, stdout) == (2, "")
    assert said in stderr
    assert "Traceback" not in stderr
