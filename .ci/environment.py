"""Make or complete the virtual environment: `python3 .ci/environment.py .venv EXTRA...`.

Standard library only. Safe to repeat: pip leaves alone what is already right. On a machine without
an NVIDIA GPU PyTorch's own CPU index is added, so that no gigabytes of CUDA are downloaded; where
that index cannot be reached, pip's own configuration decides.
"""

import os
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=3):
            return True
    except OSError:
        return False


def torch_pin() -> str:
    pins = (ROOT / "constraints.txt").read_text().split()
    return next(pin for pin in pins if pin.startswith("torch=="))


def main(folder: str, *extras: str) -> None:
    environment = Path(folder).resolve()
    python = environment / "bin" / "python"
    if not python.exists():
        if not (3, 11) <= sys.version_info < (3, 14):
            sys.exit(f"wantrt needs Python 3.11 to 3.13, this is {sys.version.split()[0]}")
        print(f"making {environment}")
        venv.create(environment, with_pip=True)

    def install(*arguments: str) -> None:
        command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        command += ["-c", ROOT / "constraints.txt", *arguments]
        print("pip install", *arguments, flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit("the environment is not complete: see pip's message above, then repeat")

    cpu_index = [] if has_gpu() or not reachable(CPU_INDEX) else ["--extra-index-url", CPU_INDEX]
    install(torch_pin(), *cpu_index)  # first and alone, so that the index serves nothing else
    install("-e", f".[{','.join(extras)}]")


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)  # pip must see this environment and nothing else
    main(*sys.argv[1:])
