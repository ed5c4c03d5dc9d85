"""The text encoder: seconds and memory of a prompt, by its length.

    wantrt bench text --variant 14B --layers 4 --tokens 32,128,512

Weights are generated, of a variant's UMT5 at full width and with `--layers` of its layers (all 24
are 22.7 GB in float32); nano's are its own. They are mapped files, read stack by stack, so what
counts on a CPU is anonymous memory, which cannot be dropped. The first pass pages the files in as
far as the system did not keep them; it is told apart. A prompt runs at its own length. Peak memory
is that of a length, with what its runtime loaded and without what an earlier one did.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from wantrt.bench.bundles import choose_bundle, describe_bundle
from wantrt.bench.floor import Cost, total
from wantrt.bench.generated import generated
from wantrt.bench.memory import PeakMemory, Peaks, anonymous_bytes
from wantrt.bench.options import RESULT, RUNTIMES, options, repeats
from wantrt.bench.rates import Rates, measure_rates
from wantrt.bench.result import Row, Table, number, run, spread, start, text
from wantrt.bundle import Bundle
from wantrt.cli.build import list_of
from wantrt.cli.command import command as bench_command
from wantrt.cli.console import Console
from wantrt.config import find_variant
from wantrt.errors import SettingsError
from wantrt.linked import refuse_other_names
from wantrt.models.components import part_components
from wantrt.runtime import loading
from wantrt.runtime.parts import load_part
from wantrt.runtime.text import TextEncoder
from wantrt.session import PRECISIONS

refuse_other_names(__spec__)

PART = "text_encoder"

TABLE = Table(
    (
        ("encoder", lambda row: f"{row['variant']}, {row['layers']} layers"),
        ("tokens", lambda row: f"{row['tokens']}"),
        ("runtime", text("runtime")),
        ("first s", number("first_s", 3)),
        ("s", number("text_s", 3)),
        ("p10", number("text_s", 3, part="p10")),
        ("p90", number("text_s", 3, part="p90")),
        ("floor", number("floor_fraction", 0, "%", 100)),
        ("load s", number("load_s")),
        ("MiB", number("peak_bytes", 0, scale=2**-20)),
    )
)


class RandomTokens:
    """Stands in for the tokenizer: the prompt "32" has 32 tokens."""

    def __init__(self, vocab_size: int, max_tokens: int) -> None:
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, prompt: str) -> Tensor:
        shape = (1, int(prompt))
        return torch.randint(3, self.vocab_size, shape, generator=self._generator)


def measure(
    bundle: Bundle,
    runtimes: Sequence[str],
    lengths: Sequence[int],
    rates: Mapping[str, Rates],
    *,
    warmup: int,
    runs: int,
    name: str | None = None,
) -> Iterator[Row]:
    """A row for each runtime and length of a prompt, in tokens; after an interruption, of the runs
    that are done.

    rates: of a runtime. name: of the variant, if a bundle of some of its layers does not know it.
    """
    name = name or bundle.variant.name
    for runtime in (loading.RUNTIMES[asked] for asked in runtimes):
        gc.collect()  # the sessions of the one before, as their memory is none of this one's
        yield from measure_runtime(
            bundle, runtime, lengths, rates[runtime.name], warmup, runs, name
        )


def measure_runtime(
    bundle: Bundle,
    runtime: loading.Runtime,
    lengths: Sequence[int],
    rates: Rates,
    warmup: int,
    runs: int,
    name: str,
) -> Iterator[Row]:
    variant = bundle.variant
    config, rows = variant.text_encoder, variant.experts[0].dit.text_len
    device = runtime.make_device()
    device.release()
    before, begun = anonymous_bytes(), time.perf_counter()
    sessions = load_part(bundle, PART, runtime, device)
    load_s = time.perf_counter() - begun
    encoder = TextEncoder(config, RandomTokens(config.vocab_size, rows), sessions, device)
    components = part_components(variant, PART, PRECISIONS[bundle.precision[PART]])
    for tokens in lengths:
        told = {
            "name": f"{name}, {config.num_layers} layers, {tokens} tokens, {runtime.name}",
            "variant": name,
            "runtime": runtime.name,
            "precision": bundle.precision[PART],
            "layers": config.num_layers,
            "tokens": tokens,
            "load_s": load_s,
        }
        cost = total(components, {"B": 1, "S": tokens})
        seen = Seen(encoder, tokens, warmup)
        try:
            seen.run(warmup + runs)
        except (Exception, KeyboardInterrupt):
            if len(seen.seconds) > warmup:
                yield told | seen.row(cost, rates, before)
            raise
        yield told | seen.row(cost, rates, before)


class Seen:
    """What prompts of one length have shown so far."""

    def __init__(self, encoder: TextEncoder, tokens: int, warmup: int) -> None:
        self.encoder, self.prompt, self.warmup = encoder, str(tokens), warmup
        self.seconds: list[float] = []
        self.peaks, self.memory = Peaks(encoder.device.torch_device), PeakMemory()

    def run(self, times: int) -> None:
        with self.memory, torch.inference_mode(), self.encoder.device.stream():
            for _ in range(times):
                self.encoder.forget()
                begun = time.perf_counter()
                self.encoder.encode([self.prompt])
                self.encoder.device.synchronize()
                self.seconds.append(time.perf_counter() - begun)

    def row(self, cost: Cost, rates: Rates, before: int) -> Row:
        """before: anonymous bytes of the process until the encoder was loaded."""
        times, floor_s = spread(self.seconds[self.warmup :]), cost.seconds(rates)
        taken = {"peak_bytes": self.memory.peak_bytes - before}
        if self.encoder.device.torch_device.type == "cuda":
            taken = self.peaks.row()
            taken["peak_bytes"] = taken["peak_allocated_bytes"]
        return {
            "first_s": self.seconds[0],
            "text_s": times,
            "floor_s": floor_s,
            "floor_fraction": floor_s / times["median"],
            "flops": cost.flops,
            "weight_bytes": cost.weight_bytes,
            **taken,
        }


@bench_command()
@click.option("--variant", default="nano", show_default=True, metavar="NAME")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="[default: all]")
@click.option(
    "--tokens",
    "lengths",
    metavar="N,…",
    callback=list_of(int),
    help="Lengths of prompts. [default: 16 and 32 of nano, 32, 128 and 512 of others]",
)
@click.option("--precision", metavar="NAME", help="[default: the runtime's]")
@options(RUNTIMES, repeats(), RESULT)
def command(
    console: Console,
    variant: str,
    layers: int | None,
    lengths: Sequence[int] | None,
    precision: str | None,
    runtimes: Sequence[str],
    warmup: int,
    runs: int,
    out: Path,
    note: str | None,
) -> int:
    """The text encoder: seconds and memory of a prompt, by its length."""
    row = find_variant(variant)
    longest = row.experts[0].dit.text_len
    lengths = lengths or ((16, 32) if row.name == "nano" else (32, 128, 512))
    if not all(1 <= tokens <= longest for tokens in lengths):
        raise SettingsError(f"--tokens are from 1 to {longest} for {row.name}")
    if layers is not None and row.name == "nano":
        raise SettingsError("--layers is for generated weights; nano has its own: leave it out")
    changes = {} if layers is None else {"text_encoder__num_layers": layers}
    source = None if row.name == "nano" else generated(0, ("text_encoder",), **changes)
    choice = choose_bundle(None, row.name, source, precision, runtimes=runtimes)
    with console.progress() as progress:
        bundle = choice.open(progress)
    chosen = [loading.choose_for(bundle, name).name for name in runtimes]
    settings: dict[str, Any] = {
        **describe_bundle(bundle),
        "variant": row.name,
        "layers": bundle.variant.text_encoder.num_layers,
        "runtimes": chosen,
        "tokens": lengths,
        "threads": torch.get_num_threads(),
        "warmup": warmup,
        "runs": runs,
    }
    result = start("text", settings, note)
    dtype = PRECISIONS[bundle.precision[PART]]
    rates = {
        name: measure_rates(loading.RUNTIMES[name].make_device().torch_device, dtype)
        for name in chosen
    }
    result.machine["rates"] = asdict(rates[chosen[0]])
    rows = measure(bundle, chosen, lengths, rates, warmup=warmup, runs=runs, name=row.name)
    return run(console, result, rows, TABLE, out)
