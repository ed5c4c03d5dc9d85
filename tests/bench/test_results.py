"""What is committed in bench/results, and the tables of the README that are made of it."""

from pathlib import Path

import pytest

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
