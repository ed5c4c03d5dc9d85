"""What is committed in bench/results, and the tables of the README that are made of it."""

from pathlib import Path

import pytest

from wantrt.bench.figures import figures
from wantrt.bench.page import page
from wantrt.bench.result import RESULTS, load
from wantrt.bench.tables import MARKS, fill, load_all, markdown

ROOT = Path(__file__).parents[2]
FILES = sorted(RESULTS.rglob("*.json"))
DOCUMENTS = [path for path in sorted(ROOT.glob("*.md")) if MARKS.search(path.read_text())]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_results_are_of_the_schema_and_whole(path):
    result = load(path)  # raises what is damaged, altered or of another schema
    assert result.rows
    assert result.partial is None
    assert result.commit
    assert {"cpu", "threads", "cores", "load", "memory_gib", "versions"} <= result.machine.keys()
    for row in result.rows:  # flat: numbers, texts, and what `spread` returns
        for key, value in row.items():
            if isinstance(value, dict):
                assert value.keys() >= {"median", "min", "max"}, key
            else:
                assert isinstance(value, (str, int, float, type(None))), key
    assert markdown(result).count("\n") >= len(result.rows) + 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_agree_with_results(document):
    content = document.read_text()
    assert fill(content, load_all([RESULTS]), "bench/results") == content, (
        f"write the tables anew: wantrt bench report bench/results --readme {document.name}"
    )


def test_the_page_shows_all_of_them():
    results = load_all([RESULTS])
    content = page(results)
    assert all(f'<section id="{name}">' in content for name in results)


SHOWN = {  # figures that a page of these commands must have
    "build": {"Time to build", "Bytes of the bundle", "Peak memory"},
    "compare": {"Times as fast as the peer", "The same work by each engine"},
    "latency": {"Where a video's time goes", "Step times", "Floor / measured", "Roofline"},
    "quality": {"Quality against speed", "SSIM"},
    "scaling": {"Step time over tokens", "Memory over tokens", "Floor / measured", "Roofline"},
    "startup": {"From a fresh process to the first video", "Peak memory"},
    "text": {"A prompt", "Floor / measured", "Roofline"},
    "throughput": {"Videos an hour", "Latency and waiting"},
    "vae": {"A chunk", "Floor / measured", "Roofline"},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_figures_are_drawn_of_what_commands_write(path):
    result = load(path)
    assert {figure.title for figure in figures(result)} >= SHOWN[result.name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_nothing_is_faster_than_its_floor(path):
    for row in load(path).rows:
        for key, value in row.items():
            if key.endswith("floor_fraction"):
                assert 0 < value <= 1, (row["name"], key)
