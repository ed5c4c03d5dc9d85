"""The three ways to install, done for real: from a wheel built from an sdist, from the folder,
editable.

The environments borrow this one's packages through a .pth file and install only wantrt into it, so
that each takes seconds and none needs the network.
"""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED_FOLDERS = ("export", "kernels", "engines", "bench")
BUILT_HERE = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q")


def run(*command: object) -> str:
    """Run in a folder without a checkout; return what it printed."""
    result = subprocess.run(
        [str(part) for part in command], cwd="/", capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def package_files() -> set[str]:
    """Every file of the package by the name it must have once installed, links followed."""
    folders = [(ROOT / "wantrt", Path("wantrt"))]
    folders += [(ROOT / name, Path("wantrt", name)) for name in LINKED_FOLDERS]
    return {
        str(installed / path.relative_to(folder))
        for folder, installed in folders
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    run(sys.executable, "-m", "pip", "wheel", *BUILT_HERE, sdist, "-w", sdist.parent)
    return next(sdist.parent.glob("*.whl"))


def test_sdist_and_wheel_hold_every_file_once(sdist, wheel):
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if "/wantrt/" in member.name]
    assert all(member.isfile() for member in members), "links would be lost on the way"
    in_sdist = sorted(member.name.partition("/")[2] for member in members)
    in_wheel = sorted(
        name for name in zipfile.ZipFile(wheel).namelist() if "dist-info/" not in name
    )
    assert in_sdist == in_wheel == sorted(package_files())


@pytest.fixture(params=["wheel from sdist", "folder", "editable"])
def python(request, tmp_path) -> Path:
    """The interpreter of a fresh environment with wantrt installed in one of the ways."""
    what = {
        "wheel from sdist": lambda: [request.getfixturevalue("wheel")],
        "folder": lambda: [ROOT],
        "editable": lambda: ["-e", ROOT],
    }[request.param]()
    venv.create(tmp_path, symlinks=True, with_pip=False)
    python = tmp_path / "bin" / "python"
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(site_packages.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", "--python", python, "install", *BUILT_HERE, *what)
    return python


def test_installed_package_works(python):
    names = sorted(package_files())
    modules = [name[:-3].replace("/", ".") for name in names if name.endswith(".py")]
    checkpoint = [name for name in names if "nano/checkpoint/" in name]
    code = f"""
import importlib.util, pathlib, wantrt
for module in {modules}:
    assert importlib.util.find_spec(module), module
root = pathlib.Path(wantrt.__file__).parents[1]
for name in {checkpoint}:
    assert (root / name).stat().st_size, name
print(root)
"""
    root = run(python, "-I", "-c", code).strip()
    assert (Path(root) == ROOT) or (python.parents[1] in Path(root).parents)
    command = python.parent / "wantrt"
    assert "generate" in run(command, "--help")
    assert (
        run(command, "--version").split()[-1]
        == run(python, "-I", "-c", "import wantrt; print(wantrt.__version__)").strip()
    )
