"""``wantrt info``: what runs here, which variants there are, what is in a bundle."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wantrt.cli.command import command
from wantrt.cli.console import Console, gib
from wantrt.config import VARIANTS, Variant, find_variant

if TYPE_CHECKING:
    from rich.table import Table

    from wantrt.bundle import Bundle


@command()
@click.argument("subject", metavar="[VARIANT|BUNDLE]", required=False)
def info(console: Console, subject: str | None) -> None:
    """Show this machine, the runtimes and all variants; or one variant; or a bundle."""
    if subject is None:
        show_machine(console)
    elif Path(subject).is_dir() or "/" in subject:
        from wantrt.bundle import Bundle

        show_bundle(console, Bundle.load(subject))
    else:
        show_variant(console, find_variant(subject))


def show_machine(console: Console) -> None:
    from wantrt.info import WORKS, describe_machine, describe_runtimes, variant_status

    machine, runtimes = describe_machine(), describe_runtimes()
    statuses = {variant.name: variant_status(variant) for variant in VARIANTS.values()}

    facts = table()
    facts.add_row("CPU", f"{machine.cpu}, {machine.threads} threads")
    facts.add_row("memory", gib(machine.memory_bytes))
    facts.add_row("GPU", "\n".join(machine.gpus) or "none")
    facts.add_row("system", f"{machine.platform}, Python {machine.python}")

    running = table("runtime", "version", "precisions", "today")
    for runtime in runtimes:
        precisions = " ".join(runtime.precisions)
        running.add_row(
            runtime.name, runtime.version or "–", precisions or "–", mark(runtime.status, WORKS)
        )

    rows = table(
        "variant", "model", "task", "size", "frames", "steps", "guidance", "shift", "today"
    )
    for variant in VARIANTS.values():
        rows.add_row(
            variant.name,
            variant.title,
            variant.task,
            "x".join(map(str, variant.size)),
            f"{variant.num_frames} @ {variant.fps}",
            str(variant.num_inference_steps),
            ", ".join(f"{expert.guidance_scale:g}" for expert in variant.experts),
            f"{variant.flow_shift:g}",
            mark(statuses[variant.name], WORKS),
        )
    console.print(facts, "", running, "", rows)
    console.print("\nMore about one: wantrt info VARIANT")
    console.result(
        {
            "machine": asdict(machine),
            "runtimes": [asdict(runtime) for runtime in runtimes],
            "variants": {
                name: {"task": VARIANTS[name].task, "today": status}
                for name, status in statuses.items()
            },
        }
    )


def show_variant(console: Console, variant: Variant) -> None:
    """All fields, a section for each record in it."""
    from wantrt.info import WORKS, describe_sizes, plain_size, variant_status
    from wantrt.tasks.source import usage

    sections: list[Any] = [section(variant.name, variant), ""]
    shown: dict[Any, str] = {}
    for expert in variant.experts:
        sections += [section(expert.name, expert, expert.dit if expert.dit not in shown else None)]
        if expert.dit in shown:
            sections[-1].add_row("", f"dimensions as {shown[expert.dit]}")
        shown[expert.dit] = expert.name
        sections += [""]
    for name in ("text_encoder", "image_encoder", "vae"):
        if (record := getattr(variant, name)) is not None:
            sections += [section(name, record), ""]
    status = variant_status(variant)
    if status == WORKS:
        sizes = describe_sizes(variant, dict.fromkeys(variant.parts, "bf16"))
        rows = sizes_table([plain_size(size) for size in sizes])
        rows.caption = f"{rows.caption}; precision bf16"
        sections += [rows, ""]
    starts_from = usage(variant.task)
    console.print(*sections, f"starts from: {starts_from}", f"today: {status}")
    console.result({**asdict(variant), "starts_from": starts_from, "today": status})


def section(title: str, *records: Any) -> "Table":
    """The plain fields of some records under a title; what is empty is left out."""
    rows = table()
    rows.columns[0].style = ""
    rows.add_row(title, style="bold")
    for record in filter(None, records):
        for field in fields(record):
            value = getattr(record, field.name)
            plain = not is_dataclass(value[0] if isinstance(value, tuple) and value else value)
            if plain and value not in (None, (), "", False):
                rows.add_row(f"  {field.name}", show(value))
    return rows


def show(value: Any) -> str:
    """832x480 for a pair of integers; lists with commas."""
    match value:
        case (int(), int()):
            return f"{value[0]}x{value[1]}"
        case tuple():
            return ", ".join(show(item) for item in value)
        case float():
            return f"{value:g}"
    return str(value)


def show_bundle(console: Console, bundle: "Bundle") -> None:
    from wantrt.info import describe_bundle

    about: dict[str, Any] = describe_bundle(bundle)
    facts = table()
    facts.add_row("variant", f"{bundle.variant.name} ({bundle.variant.title})")
    facts.add_row(
        "checkpoint",
        f"{about['checkpoint']['layout']} layout, {about['checkpoint']['fingerprint'][:16]}",
    )
    facts.add_row("starts from", about["starts_from"])
    for name, expert in about["experts"].items():
        start, end = expert["sigmas"]
        facts.add_row(
            "expert",
            f"{name}: sigma {start:g} to {end:g}, guidance {expert['guidance_scale']:g}, "
            f"{expert['num_layers']} blocks of {expert['dim']}",
        )
    facts.add_row("bytes", gib(about["bytes"]))
    facts.add_row("made with", ", ".join(f"{name} {v}" for name, v in about["tools"].items()))
    if scheduler := about["settings"].get("scheduler_config"):
        shift = scheduler.get("flow_shift", scheduler.get("shift"))
        facts.add_row("scheduler", f"{scheduler.get('_class_name')}, shift {shift}")

    parts = table("part", "precision", "weights", "files")
    for name, part in about["parts"].items():
        parts.add_row(name, part["precision"], gib(part["bytes"]), str(part["files"]))

    components = table("component", "of", "layers a run", "graph", "")
    for name, item in about["components"].items():
        components.add_row(
            name,
            ", ".join(item["parts"]),
            str(item["layers_a_run"] or "–"),
            item["graph"],
            gib(item["bytes"]),
        )
    console.print(facts, "", parts, "", components, "", sizes_table(about["sizes"]))
    console.result(about)


def sizes_table(sizes: list[dict[str, Any]]) -> "Table":
    columns = ("weights", "scratch", "caches", "buffers", "total")
    rows = table("size", "frames", "tokens", "residency", *columns, "plans")
    for size in sizes:
        facts = ["x".join(map(str, size["size"])), str(size["num_frames"]), f"{size['tokens']:,}"]
        plans = ", ".join(size["runtimes"]) or "–"
        for policy, memory in size["memory"].items():
            parts = [gib(memory[f"{column}_bytes"]) for column in columns]
            rows.add_row(*facts, policy, *parts, plans)
            facts, plans = ["", "", ""], ""
    rows.caption = "a GPU's memory at its fullest, with guidance; scratch is the torch runtime's"
    return rows


def mark(status: str, works: str) -> str:
    return f"✓ {status}" if status == works else status


def table(*columns: str) -> "Table":
    """Without columns: names on the left, values on the right."""
    from rich import box
    from rich.table import Table

    if not columns:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column()
        return facts
    made = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in columns:
        made.add_column(column)
    return made
