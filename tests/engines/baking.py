"""Bake 200 MB of mapped weights and print the memory it took, as JSON: a process for test_builder.

Anonymous memory is what counts: pages of mapped files are shared and can be dropped.
"""

import json
import tempfile
import threading
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wantrt.config import DIT_1_3B
from wantrt.engines.builder import build_plan
from wantrt.engines.flavours import find_flavour
from wantrt.engines.requests import PlanRequest
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.models.components import Component, dit_components


def main() -> None:
    config = replace(DIT_1_3B, dim=2048, ffn_dim=16384, num_heads=16, num_layers=1)
    components = dit_components(config, torch.bfloat16, ops=ONNX_OPS)
    component = next(c for c in components if c.name == "dit_stack")
    with tempfile.TemporaryDirectory() as folder:
        graph, weights = Path(folder, "graph.onnx"), Path(folder, "weights.safetensors")
        export_component(component, graph)
        save_file(make_weights(component), weights)
        with safe_open(weights, "pt") as file:
            baked = {name: file.get_tensor(name) for name in component.weights}
        request = PlanRequest(
            component=component,
            graph=graph,
            symbols={"B": (1, 1, 1), "L": (256, 256, 256)},
            targets=("sm89",),
            baked=baked,
        )
        flavour = find_flavour("tensorrt-rtx")
        before = anonymous_bytes()
        peak = watch()
        plan = build_plan(flavour, request)
        measured = {
            "weights_bytes": sum(tensor.nbytes for tensor in baked.values()),
            "plan_bytes": plan.nbytes,
            "peak_bytes": max(peak) - before,
        }
        print(json.dumps(measured))


def make_weights(component: Component) -> dict[str, torch.Tensor]:
    """Distinct numbers, so that no two weights can share a place in the plan."""
    weights, first = {}, 0
    for name, spec in component.weights.items():
        count = prod(spec.concrete({}))
        numbers = torch.arange(first, first + count, dtype=torch.int32).remainder_(65521)
        weights[name] = numbers.to(spec.dtype).reshape(spec.concrete({}))
        first += count
    return weights


def watch() -> list[int]:
    """Samples of this process's anonymous memory, taken until it ends."""
    samples = [anonymous_bytes()]

    def sample() -> None:
        while True:
            samples.append(anonymous_bytes())
            time.sleep(0.005)

    threading.Thread(target=sample, daemon=True).start()
    return samples


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
