"""UMT5-XXL at full size in float32 through ONNX Runtime: does it run on a 24 GB machine?

    python -m wantrt.bench.text_encoder FOLDER

Its weights are 22.7 GB: more than such a machine has free. They are memory-mapped and read stack by
stack, so what counts is anonymous memory (what cannot be dropped) and the time to page the file in.
Generated weights are prepared in FOLDER (22.7 GB, kept for the next run); a prompt of 32 tokens and
a negative prompt of 128 are encoded, twice: the first time as the page cache was left by preparing,
the second as the first left it.
"""

import argparse
import time
from pathlib import Path

import torch

from wantrt.bench.report import PeakMemory, write_result
from wantrt.checkpoints import open_checkpoint
from wantrt.config import VARIANTS
from wantrt.device import CPUDevice
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.linked import refuse_other_names
from wantrt.models.components import text_components
from wantrt.runtime.onnxruntime_session import load_sessions
from wantrt.runtime.text import TextEncoder

refuse_other_names(__spec__)

PROMPT_TOKENS = {"prompt": 32, "negative prompt": 128}


class RandomTokens:
    """Stands in for the tokenizer, which generated weights do not have: ids of a given number."""

    max_tokens = VARIANTS["t2v-14b"].experts[0].dit.text_len

    def __call__(self, prompt: str) -> torch.Tensor:
        vocabulary = VARIANTS["t2v-14b"].text_encoder.vocab_size
        return torch.randint(3, vocabulary, (1, PROMPT_TOKENS[prompt]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the prepared weights lie or go")
    folder = parser.parse_args().folder
    variant = VARIANTS["t2v-14b"]
    checkpoint = open_checkpoint("random:0", variant.name)
    folder.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    with PeakMemory() as preparing:
        files = checkpoint.write("text_encoder", torch.float32, folder / "text_encoder.safetensors")
    prepare_s = time.perf_counter() - start

    from safetensors.torch import load_file

    device = CPUDevice()
    with PeakMemory() as running, torch.inference_mode():
        start = time.perf_counter()
        weights = {name: t for file in files for name, t in load_file(file).items()}
        sessions = {}
        for component in text_components(variant.text_encoder, torch.float32, ops=ONNX_OPS):
            graph = folder / f"{component.name}.onnx"
            export_component(component, graph)
            sessions[component.name] = load_sessions(component, graph, weights, device)
        load_s = time.perf_counter() - start
        passes_s = []
        for _ in range(2):  # a new encoder each time: it remembers prompts
            encoder = TextEncoder(variant.text_encoder, RandomTokens(), sessions, device)
            start = time.perf_counter()
            embeds = encoder.encode(list(PROMPT_TOKENS))
            passes_s.append(round(time.perf_counter() - start, 2))
    assert torch.isfinite(embeds).all()
    assert embeds.abs().max() > 0
    measured = {
        "weights_gb": round(sum(file.stat().st_size for file in files) / 1e9, 2),
        "tokens": PROMPT_TOKENS,
        "prepare_s": round(prepare_s, 1),
        "prepare_peak_anonymous_gib": preparing.peak_gib,
        "load_s": round(load_s, 2),
        "encode_s": passes_s,
        "encode_peak_anonymous_gib": running.peak_gib,
    }
    for name, value in measured.items():
        print(f"{name:28} {value}")
    print(write_result("text_encoder", measured))


if __name__ == "__main__":
    main()
