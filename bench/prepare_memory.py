"""Preparing a full-size checkpoint: how much memory it takes, and how long.

    python -m wantrt.bench.prepare_memory FOLDER

Preparation streams, so peak anonymous memory must stay under 2 GiB plus the largest tensor whatever
the model's size. A T2V-1.3B checkpoint in the official layout is generated in FOLDER (float32:
5.7 GB of transformer, 0.5 GB of VAE; the text encoder is cut to one layer), prepared in bfloat16
and in float32, and deleted. Mapped files are page cache and do not count; what counts is RssAnon,
sampled every 5 ms, in a process that does nothing but prepare.
"""

import argparse
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from wantrt.bench.report import PeakMemory, write_result
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.layouts import write_official
from wantrt.linked import refuse_other_names
from wantrt.session import PRECISIONS

refuse_other_names(__spec__)

CHECKPOINT = "random:0:text_encoder.num_layers=1,text_encoder.vocab_size=1000"
LIMIT_GIB = 2.0  # plus the largest tensor


def generate(folder: Path) -> None:
    write_official(open_checkpoint(CHECKPOINT, "t2v-1.3b"), folder, torch.float32)


def prepare(source: Path, out: Path, precision: str) -> dict[str, Any]:
    """Prepare every part; anonymous memory from before the checkpoint is opened to the end."""
    dtype = PRECISIONS[precision]
    out.mkdir()
    with PeakMemory() as memory:
        start = time.perf_counter()
        checkpoint = open_checkpoint(source)
        files = [
            file
            for name in checkpoint.parts
            for file in checkpoint.write(name, dtype, out / f"{name}.safetensors")
        ]
        seconds = time.perf_counter() - start
    largest = max(
        parameter.nbytes
        for part in checkpoint.parts.values()
        for parameter in part.module(dtype).parameters()
    )
    return {
        "precision": precision,
        "written_gb": round(sum(file.stat().st_size for file in files) / 1e9, 3),
        "seconds": round(seconds, 1),
        "anonymous_before_gib": round(memory.start_bytes / 2**30, 3),
        "anonymous_peak_gib": memory.peak_gib,
        "largest_tensor_gib": round(largest / 2**30, 3),
        "limit_gib": round(LIMIT_GIB + largest / 2**30, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="scratch folder for 12 GB, made and deleted")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True)
    processes = multiprocessing.get_context("spawn")
    try:
        with processes.Pool(1, maxtasksperchild=1) as pool:  # a fresh process for each
            pool.apply(generate, (folder / "checkpoint",))
            stored = sum(f.stat().st_size for f in (folder / "checkpoint").rglob("*.*"))
            runs = []
            for precision in ("bf16", "fp32"):
                arguments = (folder / "checkpoint", folder / precision, precision)
                runs.append(pool.apply(prepare, arguments))
                shutil.rmtree(folder / precision)
                print(runs[-1])
    finally:
        shutil.rmtree(folder)
    path = write_result(
        "prepare_memory",
        {"checkpoint": CHECKPOINT, "stored_gb": round(stored / 1e9, 3), "runs": runs},
    )
    print(path)
    if over := [run for run in runs if run["anonymous_peak_gib"] > run["limit_gib"]]:
        raise SystemExit(f"over the limit: {over}")


if __name__ == "__main__":
    main()
