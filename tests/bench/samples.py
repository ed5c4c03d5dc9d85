"""Invented results of every command, for tests of the page and of tables: no measurement."""

from typing import Any

from wantrt.bench.result import Result, Row, spread

MACHINE: dict[str, Any] = {
    "cpu": "Invented CPU",
    "cores": 8,
    "threads": 4,
    "load": 0.5,
    "memory_gib": 64.0,
    "python": "3.11.7",
    "versions": {"torch": "0.0.1", "onnxruntime": "0.0.2"},
    "rates": {"matrix": 2.1e11, "attention": 1.4e11, "copy": 1.9e10},
}
GPU = MACHINE | {
    "gpu": "Invented GPU",
    "gpu_memory_gib": 80.0,
    "gpu_state": {"driver_version": "000.00", "clocks_sm_mhz": 1500.0, "power_draw_w": 300.0},
    "rates": {"matrix": 7.0e14, "attention": 6.0e14, "copy": 3.9e12},
}


def around(middle: float, runs: int = 5) -> dict[str, float]:
    return spread([middle * (1 + 0.03 * (index - runs // 2) / runs) for index in range(runs)])


def sample(name: str, rows: list[Row], machine: dict[str, Any] = MACHINE, **other: Any) -> Result:
    given: dict[str, Any] = {"settings": {"seed": 0, "steps": 20}, "partial": None} | other
    return Result(
        name=name,
        command=f"wantrt bench {name} --seed 0",
        date="2001-02-03T04:05Z",
        commit="0123456789ab",
        machine=machine,
        rows=rows,
        **given,
    )


def latency_row(name: str, scale: float = 1.0) -> Row:
    stages = {"text_s": 0.4, "denoise_s": 31.0, "vae_decode_s": 4.1}
    return {
        "name": name,
        **{key: around(seconds * scale) for key, seconds in stages.items()},
        "step_ms": around(1550 * scale, 20),
        "first_frame_s": around(31.9 * scale),
        "e2e_s": around(35.6 * scale),
        "floor_fraction": 0.71,
        "denoise_floor_fraction": 0.74,
        "vae_decode_floor_fraction": 0.52,
        "peak_rss_bytes": 3.1e9 * scale,
        "peak_gpu_bytes": 2.2e10 * scale,
    }


def scaling_rows() -> list[Row]:
    sizes = {"480p, 17 frames": 7800, "480p, 81 frames": 32760, "720p, 81 frames": 75600}
    rows: list[Row] = []
    for axis, batch, slower in (("tokens", 2, 1.9), ("batch", 1, 1.0)):
        for name, tokens in sizes.items():
            floor_ms = slower * (tokens * 0.01 + tokens**2 * 4e-7)
            rows.append(
                {
                    "name": name,
                    "axis": axis,
                    "batch": batch,
                    "tokens": tokens,
                    "step_ms": around(1.3 * floor_ms + 20),
                    "floor_ms": floor_ms,
                    "peak_gpu_bytes": 1.0e10 + slower * tokens * 2e5,
                }
            )
    return rows


def compare_rows() -> list[Row]:
    rows: list[Row] = []
    engines = {"wantrt": 1.0, "diffusers eager": 2.02, "diffusers compiled": 1.31}
    for work, seconds in {"nano, end to end": 1.4, "DiT stack at 1.3B width": 14.0}.items():
        for engine, slower in engines.items():
            rows.append(
                {"name": work, "engine": engine, "seconds": around(seconds * slower)}
                | ({"ratio": around(slower), "parity": 4e-6} if engine != "wantrt" else {})
            )
    return rows


def quality_rows() -> list[Row]:
    speeds = {"fp16": (1.1, 44.0, 0.995), "fp8": (1.6, 33.0, 0.97), "fp8, cached": (2.4, 24.5, 0.9)}
    rows: list[Row] = [
        {"name": name, "speedup": speedup, "psnr_db": around(psnr), "ssim": ssim}
        for name, (speedup, psnr, ssim) in speeds.items()
    ]
    return [*rows, {"name": "another attention", "noise_floor": True, "psnr_db": 41.0, "ssim": 1}]


def kernel_rows() -> list[Row]:
    ops = {"modulate": 0.91, "qk_norm_rope": 0.87, "rms_norm": 0.82}
    return [
        {
            "name": f"{op} bf16 32760x5120",
            "op": op,
            "kernel_us": around(300 / share, 20),
            "copy_fraction": share,
            "speedup_over_compiled": share * 1.3,
        }
        for op, share in ops.items()
    ]


def block_rows() -> list[Row]:
    return [
        {
            "name": f"14b {contender}",
            "ms": around(total, 10),
            "gemm_ms": 18.0,
            "attention_ms": 21.0,
            "rest_ms": total - 39.5,
            "floor_fraction": 37 / total,
            "flops": 2.6e13,
            "weight_bytes": 7.0e8,
        }
        for contender, total in {"kernels": 41.0, "diffusers": 49.0}.items()
    ]


def samples() -> dict[str, Result]:
    """By the names of their files."""
    build: list[Row] = [
        {
            "name": f"t2v-1.3b {way}",
            "what": way,
            "build_s": seconds,
            "graphs_s": 0.1 * seconds,
            "plans_s": 0.7 * seconds,
            "bytes": size,
            "plans_bytes": 0.9 * size,
            "peak_rss_bytes": rss,
        }
        for way, seconds, size, rss in (
            ("bound", 78.0, 1_050_000_000, 1.1e9),
            ("baked", 370.0, 6_600_000_000, 2.7e9),
        )
    ]
    build.append({"name": "plan dit_stack", "kind": "plan", "build_s": 30.0, "bytes": 10_000})
    startup = [
        {
            "name": cache,
            "import_s": 0.9,
            "load_s": load,
            "first_s": around(3),
            "second_s": around(2),
        }
        for cache, load in (("cold file cache", 12.0), ("warm file cache", 1.8))
    ]
    throughput = [
        {
            "name": f"closed, {n} at once",
            "videos_per_hour": 100 + 9 * n,
            "latency_s": around(35.0 * n),
            "queue_s": around(35.0 * (n - 1) + 0.01),
        }
        for n in (1, 2, 4)
    ]
    chunks = [
        {
            "name": f"decoder, {size}",
            "chunk_ms": around(ms),
            "floor_fraction": 0.6,
            "peak_gpu_bytes": ms * 5e7,
        }
        for size, ms in {"832x480": 25.0, "1280x720": 58.0}.items()
    ]
    text = [{"name": "512 tokens", "text_s": around(0.02), "floor_fraction": 0.31}]
    latency = [latency_row("t2v-1.3b, 832x480, 81 frames"), latency_row("t2v-14b", 6.0)]
    found = {
        "latency": sample("latency", latency, GPU, partial="KeyboardInterrupt: interrupted"),
        "throughput": sample("throughput", throughput, GPU),
        "scaling": sample("scaling", scaling_rows(), GPU),
        "startup": sample("startup", startup),
        "build": sample("build", build, note="<b>not</b> & bold"),
        "kernels": sample("kernels", kernel_rows(), GPU),
        "block": sample("block", block_rows(), GPU),
        "vae": sample("vae", chunks, GPU),
        "text": sample("text", text, GPU),
        "quality": sample("quality", quality_rows()),
        "compare": sample("compare", compare_rows()),
    }
    return found
