"""The same work by wantrt and by what a user would pick instead, in turn and in one process.

    wantrt bench compare --scope pipeline,dit,vae --runtime onnxruntime,torch

Scopes: a whole video of a checkpoint (`pipeline`: prompt in, frames out, the text encoded anew each
time); one pass of a transformer of full width with a few blocks (`dit`: time embedding, text
projection, patches and head included); the VAE's decoder (`vae`). All sides have the same
checkpoint, precision, latents, steps and number of threads; what each has loaded is read off its
objects, and unequal settings are refused.

Outputs are compared first: the difference, as the root of its mean square in units of that of the
reference, must be below `TOLERANCE`, or the engine is not timed. Then rounds: in each, every engine
runs once, so that what else the machine does meets all alike. `ratio` is a round's time over that
of `ratio_to`, wantrt's first runtime whose output is right, so above 1 that one is faster. Peers
are files of bench/peers/; one that is missing, fails, or is of another version than constraints.txt
pins, is reported, and the others go on.

`peak_allocated_bytes` is what an engine adds to a GPU's memory at its peak in the run whose output
is compared, its weights included, by torch's allocator: what TensorRT allocates by itself is not in
it. On a CPU, engines in one process share what was freed, and no number is fair.
"""

import gc
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from wantrt.bench.floor import Cost, decode_cost, step_cost, total
from wantrt.bench.generated import generated
from wantrt.bench.options import RESULT, SEED, options, repeats
from wantrt.bench.peers.base import PEERS, Done, Engine, Loaded, Peer, Work, find_peer
from wantrt.bench.peers.ours import Ours
from wantrt.bench.rates import Rates, measure_rates
from wantrt.bench.result import Row, Table, number, run, spread, start, text
from wantrt.build import choose_precision, plan_build
from wantrt.checkpoints import Checkpoint, open_checkpoint
from wantrt.checkpoints.layouts import write_diffusers
from wantrt.cli.build import list_of
from wantrt.cli.command import command as bench_command
from wantrt.cli.command import size_option
from wantrt.cli.console import Console
from wantrt.config import Size, Variant, find_variant
from wantrt.errors import BenchError, SettingsError
from wantrt.linked import refuse_other_names
from wantrt.models.components import part_components
from wantrt.names import check_name
from wantrt.nano.scenes import load_held_out
from wantrt.nano.tokenizer import save_tokenizer
from wantrt.runtime.loading import RUNTIMES, choose_runtime
from wantrt.runtime.settings import check_frames, check_size
from wantrt.runtime.sizes import dit_symbols
from wantrt.session import PRECISIONS

refuse_other_names(__spec__)

log = logging.getLogger("wantrt")

# Root of the mean square of the difference, over that of the reference. In float32 only the order
# of sums differs; what is left in 16 bits are roundings, where we keep more in float32 than peers.
TOLERANCE = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 5e-2}
SCOPES = {"pipeline": "pipeline", "dit": "transformer", "vae": "decoder"}  # -> method of an Engine
TEXT_ROWS = 60  # of the features of a prompt; the others are padding, which is zero

TABLE = Table(
    (
        ("work", text("scope")),
        ("engine", lambda row: row["engine"] + (f": {row['says']}" if "says" in row else "")),
        ("s", number("seconds", 3)),
        ("p90", number("seconds", 3, part="p90")),
        ("floor", number("floor_fraction", 0, "%", 100)),
        ("ratio", number("ratio", 2)),
        ("p10", number("ratio", 2, part="p10")),
        ("p90", number("ratio", 2, part="p90")),
        ("difference", lambda row: f"{row['parity']:.1g}" if "parity" in row else ""),
    )
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a scope measures, before anything is opened. blocks: None leaves them all."""

    scope: str
    variant: str
    checkpoint: str | None  # as `open_checkpoint` takes it; None: the variant's own
    size: Size
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    blocks: int | None
    seed: int


def set_up(
    scope: str,
    *,
    variant: str | None = None,
    checkpoint: str | None = None,
    size: Size | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    blocks: int | None = None,
    seed: int = 0,
) -> Setup:
    """Complete and check what was asked for. Raises SettingsError, BenchError."""
    check_name("scope", scope, SCOPES)
    whole = scope == "pipeline"
    row = find_variant(variant or ("nano" if whole else "t2v-1.3b"))
    if row.task != "t2v" or len(row.experts) != 1:
        raise BenchError(
            f"{row.name} is not compared: the peers' adapters know text to video with one "
            "transformer. Take --variant nano, 1.3B or 14B"
        )
    mine = {"dit": ("--blocks",), "pipeline": ("--checkpoint", "--steps", "--guidance-scale")}
    given = {
        "--blocks": blocks,
        "--checkpoint": checkpoint,
        "--steps": num_inference_steps,
        "--guidance-scale": guidance_scale,
    }
    for option, value in given.items():
        if value is not None and option not in mine.get(scope, ()):
            raise SettingsError(f"{option} means nothing to --scope {scope}; leave it out")
    if scope == "dit":
        blocks = 2 if blocks is None else blocks
        checkpoint = generated(seed, ("dit", "vae"), num_layers=blocks)
    elif scope == "vae":
        checkpoint = generated(seed, ("vae",))
    frames = row.num_frames if whole else {"dit": 17, "vae": 5}[scope]
    scale = row.experts[0].guidance_scale if guidance_scale is None else guidance_scale
    setup = Setup(
        scope=scope,
        variant=row.name,
        checkpoint=checkpoint,
        size=size or (row.size if whole else (416, 240)),
        num_frames=frames if num_frames is None else num_frames,
        num_inference_steps=(num_inference_steps or row.num_inference_steps) if whole else 0,
        guidance_scale=scale if whole else 1.0,
        blocks=blocks,
        seed=seed,
    )
    check_size(row, setup.size)
    check_frames(row, setup.num_frames)
    open_checkpoint(setup.checkpoint, row.name)  # it checks
    return setup


def choose_engines(runtimes: Sequence[str], precision: str | None) -> tuple[list[str], str]:
    """The runtimes, and the precision that they share. Raises for what cannot be compared."""
    names = [choose_runtime(name, ()).name for name in runtimes]
    precisions = {name: choose_precision(name, precision) for name in names}
    if len(set(precisions.values())) > 1:
        told = ", ".join(f"{name} {its}" for name, its in precisions.items())
        raise BenchError(f"unequal settings: {told}. Name one --precision")
    places = {name: "a GPU" if RUNTIMES[name].on_gpu() else "the CPU" for name in names}
    if len(set(places.values())) > 1:
        told = ", ".join(f"{name} on {where}" for name, where in places.items())
        raise BenchError(f"unequal settings: {told}. Name the runtimes of one of the two")
    return names, next(iter(precisions.values()))


def prepare(setup: Setup, precision: str, device: torch.device, folder: Path) -> Work:
    """Open the checkpoint, and write it into `folder` in Diffusers layout if it is in no such."""
    opened = open_checkpoint(setup.checkpoint, setup.variant)
    variant = opened.variant
    vae, (expert,) = variant.vae, variant.experts
    width, height = (side // vae.spatial_stride for side in setup.size)
    frames = (setup.num_frames - 1) // vae.temporal_stride + 1
    generator = torch.Generator().manual_seed(setup.seed)
    latents = torch.randn(1, vae.z_dim, frames, height, width, generator=generator)
    text_embeds = None
    if setup.scope == "dit":
        text_embeds = torch.randn(1, expert.dit.text_len, expert.dit.text_dim, generator=generator)
        text_embeds[:, TEXT_ROWS:] = 0
    return Work(
        checkpoint=in_diffusers_layout(opened, folder, precision),
        variant=variant,
        precision=precision,
        device=device,
        size=setup.size,
        num_frames=setup.num_frames,
        latents=latents,
        text_embeds=text_embeds,
        prompts=[str(entry["prompt"]) for entry in load_held_out()],
        num_inference_steps=setup.num_inference_steps,
        guidance_scale=setup.guidance_scale,
    )


def in_diffusers_layout(checkpoint: Checkpoint, folder: Path, precision: str) -> Path:
    given = Path(checkpoint.source)
    if checkpoint.layout == "diffusers" and given.is_dir():
        return given
    write_diffusers(checkpoint, folder, PRECISIONS[precision])
    if checkpoint.tokenizer is None:  # generated weights have none: nano's words do
        save_tokenizer(folder / "tokenizer")
    return folder


def build_ours(work: Work, runtimes: Sequence[str], folder: Path) -> list[Ours]:
    """A bundle for the runtimes that run graphs, one for each that runs plans."""
    found = []
    for name in runtimes:
        compiled = RUNTIMES[name].compiled
        out = folder / (f"bundle-{name}" if compiled else "bundle")
        build = plan_build(
            str(work.checkpoint),
            out=out,
            runtime=name,
            precision=work.precision,
            sizes=[work.size] if compiled else None,
            frames=[work.num_frames] if compiled else None,
        )
        found.append(Ours(build.run(), name))
    return found


def cost_of(setup: Setup, variant: Variant, precision: str) -> Cost:
    """Of a whole video without its text encoder, whose cost the prompt decides."""
    dtype, (expert,) = PRECISIONS[precision], variant.experts
    size, frames = setup.size, setup.num_frames
    if setup.scope == "dit":
        symbols = {**dit_symbols(variant, size, frames, guided=False), "T": 1}
        cost = total(part_components(variant, expert.name, dtype), symbols)
    else:
        cost = decode_cost(variant, size, frames, dtype)
    if setup.scope == "pipeline":
        guided = setup.guidance_scale != 1.0
        step = step_cost(variant, expert.name, size, frames, guided, dtype)
        cost = cost + step * setup.num_inference_steps
    return cost


@dataclass
class Entry:
    """An engine that is timed. says: what is to be known about it; done: of every round."""

    engine: Engine
    loaded: Loaded
    parity: float
    says: str | None
    memory: dict[str, int]
    done: list[Done] = field(default_factory=list)


def measure(
    scope: str,
    work: Work,
    ours: Sequence[Engine],
    peers: Sequence[tuple[Peer, str | None]],
    *,
    warmup: int,
    runs: int,
    cost: Cost,
    rates: Rates,
) -> Iterator[Row]:
    """A row for each engine; after an interruption, of the rounds that are whole.

    ours: at least one; a failure of theirs goes on, one of a peer is a row. peers: each with what
    is to be said of it; the first that runs is the reference of outputs, or else the first of ours.
    Raises BenchError for unequal settings, and at the end where an engine's output was wrong.
    """
    entries: list[Entry] = []
    refused: list[str] = []
    reference, its_name = None, ""
    for engine, says in [*peers, *((engine, None) for engine in ours)]:
        try:
            loaded, result, memory = first_run(scope, engine, work)
        except Exception as error:
            if engine in ours:
                raise
            yield failed_row(scope, engine, error)
            continue
        if entries:
            refuse_unequal(entries[0], engine, loaded)
        if reference is None:
            reference, its_name = result, engine.name
        parity = difference(result, reference)
        if not parity <= TOLERANCE[work.precision]:
            refused.append(f"{engine.name} in {scope}, by {parity:.1e}")
            wrong = "not timed: its output is wrong"
            yield {**name_row(scope, engine), "parity": parity, "says": wrong}
            del loaded
            continue
        entries.append(Entry(engine, loaded, parity, says, memory))
    entries.sort(key=lambda entry: entry.engine not in ours)
    if any(entry.engine in ours for entry in entries):
        try:
            for index in range(1, 1 + warmup + runs):
                found = []
                for entry in entries[:]:
                    try:
                        found.append(entry.loaded.run(index))
                    except Exception as error:
                        if entry.engine in ours:
                            raise
                        entries.remove(entry)
                        yield failed_row(scope, entry.engine, error)
                if index > warmup:
                    for entry, done in zip(entries, found, strict=True):
                        entry.done.append(done)
        except (Exception, KeyboardInterrupt):
            yield from rows_of(scope, entries, cost, rates)
            raise
        yield from rows_of(scope, entries, cost, rates)
    if refused:
        raise BenchError(
            f"outputs differ from those of {its_name}: {'; '.join(refused)} (at most "
            f"{TOLERANCE[work.precision]:g} of scale); these were not timed"
        )


def first_run(
    scope: str, engine: Engine, work: Work
) -> tuple[Loaded, torch.Tensor, dict[str, int]]:
    """An engine, its output, and on a GPU the peak memory of the run beyond what was allocated."""
    gc.collect()  # engines that failed
    on_gpu = work.device.type == "cuda"
    before = torch.cuda.memory_allocated(work.device) if on_gpu else 0
    loaded: Loaded = getattr(engine, SCOPES[scope])(work)
    if not on_gpu:
        return loaded, loaded.run(0).result.float(), {}
    torch.cuda.reset_peak_memory_stats(work.device)
    result = loaded.run(0).result.float()
    peak = torch.cuda.max_memory_allocated(work.device)
    return loaded, result, {"peak_allocated_bytes": peak - before}


def name_row(scope: str, engine: Engine) -> Row:
    return {"name": f"{scope}: {engine.name}", "scope": scope, "engine": engine.name}


def failed_row(scope: str, engine: Engine, error: Exception) -> Row:
    failed = f"failed: {type(error).__name__}: {first_line(error)}"
    log.warning("%s %s", engine.name, failed)
    return {**name_row(scope, engine), "says": failed}


def rows_of(scope: str, entries: Sequence[Entry], cost: Cost, rates: Rates) -> Iterator[Row]:
    """Of the rounds that are whole; all entries have as many."""
    base, floor_s = entries[0], cost.seconds(rates)
    if not base.done:
        return
    for entry in entries:
        seconds = [one.seconds for one in entry.done]
        found = spread(seconds)
        row: Row = {
            **name_row(scope, entry.engine),
            "seconds": found,
            "floor_s": floor_s,
            "floor_fraction": floor_s / found["median"],
            "flops": cost.flops,
            "weight_bytes": cost.weight_bytes,
            "parity": entry.parity,
            **entry.memory,
        }
        if entry is not base:
            pairs = zip(entry.done, base.done, strict=True)
            row["ratio"] = spread([mine.seconds / its.seconds for mine, its in pairs])
            row["ratio_to"] = base.engine.name
        for stage in entry.done[0].stages:
            row[stage] = spread([value for one in entry.done for value in one.stages[stage]])
        yield {**row, **({"says": entry.says} if entry.says else {})}


def refuse_unequal(first: Entry, engine: Engine, loaded: Loaded) -> None:
    for key, value in first.loaded.settings.items():
        if loaded.settings.get(key) != value:
            raise BenchError(
                f"unequal settings: {key} is {value} in {first.engine.name} and "
                f"{loaded.settings.get(key)} in {engine.name}; make them the same"
            )


def difference(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Root of the mean square of the difference, over the reference's; inf for other shapes."""
    if result.shape != reference.shape:
        return float("inf")
    return float((result - reference).norm() / reference.norm())


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def find_peers(names: Sequence[str]) -> tuple[list[tuple[Peer, str | None]], list[Row]]:
    """Those that are there, and rows for those that are not."""
    found, missing = [], []
    for name in names:
        try:
            found.append(find_peer(name))
        except ModuleNotFoundError as error:
            log.warning("%s is missing: %s", name, error)
            missing.append({"name": name, "engine": name.replace("-", " "), "says": str(error)})
    return found, missing


def measure_all(
    setups: Sequence[Setup],
    runtimes: Sequence[str],
    peers: Sequence[tuple[Peer, str | None]],
    precision: str,
    *,
    warmup: int,
    runs: int,
    rates: Rates,
) -> Iterator[Row]:
    device = RUNTIMES[runtimes[0]].make_device().torch_device
    for setup in setups:
        with tempfile.TemporaryDirectory(prefix="wantrt-compare-") as folder:
            work = prepare(setup, precision, device, Path(folder) / "checkpoint")
            ours = build_ours(work, runtimes, Path(folder))
            cost = cost_of(setup, work.variant, precision)
            yield from measure(
                *(setup.scope, work, ours, peers), warmup=warmup, runs=runs, cost=cost, rates=rates
            )


@bench_command()
@click.option(
    "--scope",
    "scopes",
    default="pipeline",
    show_default=True,
    metavar="NAME,…",
    callback=list_of(str),
    help="pipeline (a whole video), dit (a transformer), vae (a decoder).",
)
@click.option("--variant", metavar="NAME", help="[default: nano; of dit and vae t2v-1.3b]")
@click.option("--checkpoint", metavar="SOURCE", help="Of a pipeline. [default: the variant's]")
@click.option(
    "--size",
    metavar="WxH",
    callback=size_option,
    help="Pixels. [default: the variant's; of dit and vae 416x240]",
)
@click.option(
    "--frames",
    "num_frames",
    type=int,
    metavar="N",
    help="[default: the variant's; of dit 17, of vae 5]",
)
@click.option("--steps", "num_inference_steps", type=click.IntRange(2), metavar="N")
@click.option("--guidance-scale", type=float, metavar="X", help="1 is no guidance.")
@click.option(
    "--blocks", type=click.IntRange(1), metavar="N", help="Of a transformer. [default: 2]"
)
@click.option(
    "--runtime",
    "runtimes",
    default="auto",
    show_default=True,
    metavar="NAME,…",
    callback=list_of(str),
    help="Ours; ratios are to the first.",
)
@click.option(
    "--peers",
    default=",".join(PEERS),
    show_default=True,
    metavar="NAME,…",
    callback=list_of(str),
)
@click.option("--precision", metavar="NAME", help="fp32, bf16 or fp16. [default: the runtime's]")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="[default: as torch has them]")
@options(SEED, repeats(), RESULT)
def command(
    console: Console,
    scopes: Sequence[str],
    runtimes: Sequence[str],
    peers: Sequence[str],
    precision: str | None,
    threads: int | None,
    warmup: int,
    runs: int,
    note: str | None,
    out: Path,
    **asked: Any,
) -> int:
    """The same work by wantrt and by diffusers, eager and compiled, in turn.

    Outputs are compared first: an engine whose result is wrong is not timed. "floor" is the share
    of the best that this machine's measured rates allow.
    """
    if len(scopes) > 1 and any(value is not None for n, value in asked.items() if n != "seed"):
        raise SettingsError(
            "several scopes are measured at their defaults: name one --scope with these options"
        )
    for name in peers:
        check_name("peer", name, PEERS)
    setups = [set_up(scope, **asked) for scope in scopes]
    names, shared = choose_engines(runtimes, precision)
    if threads is not None:
        torch.set_num_threads(threads)
    found, missing = find_peers(peers)
    device = RUNTIMES[names[0]].make_device().torch_device
    result = start(
        "compare",
        {
            "scopes": [asdict(setup) for setup in setups],
            "runtimes": names,
            "peers": list(peers),
            "precision": shared,
            "threads": torch.get_num_threads(),
            "warmup": warmup,
            "runs": runs,
        },
        note,
    )
    rates = measure_rates(device, PRECISIONS[shared])
    result.machine["rates"] = asdict(rates)

    def rows() -> Iterator[Row]:
        yield from missing
        yield from measure_all(setups, names, found, shared, warmup=warmup, runs=runs, rates=rates)

    return run(console, result, rows(), TABLE, out)
