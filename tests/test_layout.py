"""The shape of the repository: links, import names, what importing costs."""

import ast
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import wantrt
from wantrt.linked import refuse_other_names

ROOT = Path(__file__).resolve().parents[1]
LINKED_FOLDERS = ("export", "kernels", "engines", "bench")
HEAVY = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "numpy", "av", "PIL", "rich"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def linked_modules() -> list[Path]:
    return sorted(path for folder in LINKED_FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", LINKED_FOLDERS)
def test_links_are_there(folder):
    link = ROOT / "wantrt" / folder
    assert link.is_symlink(), f"{link} is no link: check out again with git's core.symlinks=true"
    assert link.readlink() == Path("..", folder)
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must stay without __init__.py"


def calls_guard(module: Path) -> bool:
    statements = ast.parse(module.read_text()).body
    return any(ast.unparse(node) == "refuse_other_names(__spec__)" for node in statements)


def test_every_linked_module_is_guarded():
    unguarded = [str(path.relative_to(ROOT)) for path in linked_modules() if not calls_guard(path)]
    assert not unguarded, f"call refuse_other_names(__spec__) after the imports of {unguarded}"


def test_guard_refuses_other_names(tmp_path):
    refuse_other_names(ModuleSpec("wantrt.bench.x", loader=None))
    script = tmp_path / "bench" / "x.py"
    script.parent.mkdir()
    script.write_text(
        "from wantrt.linked import refuse_other_names\nrefuse_other_names(__spec__)\n"
    )
    as_second_copy = run_python(
        "-c", f"import sys; sys.path.append({str(tmp_path)!r}); import bench.x"
    )
    assert "import bench.x as wantrt.bench.x" in as_second_copy.stderr
    as_script = run_python(
        "-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    assert "python -m wantrt" in as_script.stderr


def loaded_by(statement: str) -> set[str]:
    result = run_python("-c", f"import sys; {statement}; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_loads_nothing_heavy():
    assert not loaded_by("import wantrt") & HEAVY
    assert not loaded_by("import wantrt.cli") & HEAVY


def test_public_names_are_lazy_and_real():
    for name in wantrt.__all__:
        assert getattr(wantrt, name) is not None
    assert set(wantrt.__all__) <= set(dir(wantrt))
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        wantrt.Pipelin  # noqa: B018


ABSENT_ON_THE_GPU_MACHINE = (
    *("diffusers", "transformers", "tokenizers", "ftfy", "huggingface_hub", "onnx"),
    *("onnxruntime", "av", "PIL", "click", "rich", "hypothesis", "xdist", "tensorrt_rtx"),
)


def test_gpu_pieces_need_only_torch_and_pytest():
    """`make gpu` runs on a machine with torch, Triton, pytest, safetensors and nothing of ours."""
    pieces = re.findall(r"^GPU_\d+ := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    paths = " ".join(pieces).split()
    code = f"""
import os, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
for name in {ABSENT_ON_THE_GPU_MACHINE}:
    sys.modules[name] = None  # importing it fails, as if it were not there
import pytest
sys.exit(pytest.main(["--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *{paths}]))
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stdout + result.stderr


def best_seconds(*arguments: str) -> float:
    """Shortest of five runs, in CPU seconds: what else the machine is doing does not count."""

    def seconds() -> float:
        before = os.times()
        result = run_python(*arguments)
        after = os.times()
        assert result.returncode == 0, result.stderr
        used = after.children_user + after.children_system
        return used - before.children_user - before.children_system

    return min(seconds() for _ in range(5))


def test_start_is_quick():
    python_seconds = best_seconds("-c", "pass")
    assert best_seconds("-c", "import wantrt") - python_seconds < 0.3
    assert best_seconds("-m", "wantrt.cli", "--help") < 0.5
