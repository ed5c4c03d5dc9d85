"""Text to video from a bundle.

    with Pipeline.load("my-bundle") as pipe:
        video = pipe("a cat surfing", seed=42)
        video.save("cat.mp4")

The same seed on the same machine and runtime gives the same bits. A pipeline serves one generation
at a time; a second one, from whichever thread, is refused.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wantrt import __version__
from wantrt.bundle import Bundle
from wantrt.config import Variant, require_task
from wantrt.device import Device
from wantrt.errors import CancelledError, ExecutionError, SettingsError
from wantrt.media import Video
from wantrt.runtime.decoder import Decoder, to_frames
from wantrt.runtime.denoiser import Denoiser, Stage, Transformer
from wantrt.runtime.loading import Files, Runtime, choose_runtime
from wantrt.runtime.prompt import Tokenizer
from wantrt.runtime.settings import Settings, resolve
from wantrt.runtime.text import TextEncoder
from wantrt.schedulers.grids import Grid, count_high_noise_steps, make_grid
from wantrt.schedulers.noise import draw_noise
from wantrt.session import Session

log = logging.getLogger("wantrt")

Frames = NDArray[np.uint8]  # [T, H, W, 3]


@dataclass(frozen=True)
class Progress:
    """Where a generation is: `done` of `total` in "text", "denoise" or "decode".

    `latents` [1, C, F, H, W] is there while denoising: the sample after the step, valid until the
    next one.
    """

    stage: str
    done: int
    total: int
    latents: Tensor | None = None


Callback = Callable[[Progress], bool | None]  # returning False cancels


class Pipeline:
    """A loaded bundle, ready to generate."""

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        device: Device,
        text_encoder: TextEncoder,
        transformers: Sequence[Transformer],
        decoder: Decoder,
    ) -> None:
        self.bundle, self.runtime, self.device = bundle, runtime, device
        self.text_encoder, self.transformers, self.decoder = text_encoder, transformers, decoder
        self._busy = threading.Lock()
        self._cancelled = threading.Event()
        self._closed = False

    @classmethod
    def load(
        cls, bundle: str | os.PathLike[str] | None = None, runtime: str | None = None
    ) -> "Pipeline":
        """Load a bundle; None is the small `nano` checkpoint that ships with wantrt.

        runtime: "onnxruntime" or "torch"; None takes the best one that bundle and machine share.
        Raises BundleError, RuntimeUnavailableError, UnsupportedTaskError, SettingsError.
        """
        if bundle is None:
            from wantrt.build import default_bundle

            loaded = default_bundle()
        else:
            loaded = Bundle.load(Path(bundle))
        variant = loaded.variant
        require_task(variant.task, variant.name)
        chosen = choose_runtime(runtime, loaded.precision.values())
        device = chosen.make_device()

        def sessions(part: str, prefix: str = "") -> dict[str, Sequence[Session]]:
            weights = {
                name: tensor.to(device.torch_device)
                for name, tensor in loaded.weights(part).items()
            }
            return {
                c.name: chosen.load(c, Files(loaded.graph(c.name, part)), weights, device)
                for c in loaded.components(part)
                if c.name.startswith(prefix)
            }

        text_encoder = TextEncoder(
            variant.text_encoder,
            Tokenizer(loaded.tokenizer, variant.experts[0].dit.text_len),
            sessions("text_encoder"),
            device,
        )
        transformers = [Transformer(e.dit, sessions(e.name)) for e in variant.experts]
        decoder = Decoder(variant.vae, sessions("vae", "vae_decoder"), device)
        return cls(loaded, chosen, device, text_encoder, transformers, decoder)

    @property
    def variant(self) -> Variant:
        return self.bundle.variant

    def resolve(self, prompt: str, **settings: Any) -> Settings:
        """The settings that a call with these arguments runs with; raises what it would raise."""
        return resolve(self.variant, self.bundle.settings, prompt=prompt, **settings)

    def __call__(
        self,
        prompt: str | Settings,
        *,
        init_latents: Tensor | None = None,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Video:
        """Generate a whole video. See `stream` for the arguments."""
        timings: dict[str, float] = {}
        resolved = self._settings(prompt, settings)
        chunks = list(self._generate(resolved, init_latents, callback, timings))
        return Video(
            frames=np.concatenate(chunks),
            fps=self.variant.fps,
            timings=timings,
            metadata=self.metadata(resolved),
        )

    def stream(
        self,
        prompt: str | Settings,
        *,
        init_latents: Tensor | None = None,
        callback: Callback | None = None,
        timings: dict[str, float] | None = None,
        **settings: Any,
    ) -> Iterator[Frames]:
        """Yield frames uint8 [T, H, W, 3] as they are decoded: 1, then 4 at a time.

        settings (all optional): negative_prompt, size (width, height), num_frames,
        num_inference_steps, guidance_scale, guidance_scale_2, flow_shift, solver, convention, seed,
        noise; or `prompt` is what `resolve` returned. init_latents: [1, C, F, H, W] in the place of
        the noise. callback: called with `Progress` after every piece of work; returning False
        cancels (CancelledError). timings: filled with seconds by phase.
        """
        resolved = self._settings(prompt, settings)
        return self._generate(resolved, init_latents, callback, timings)

    def cancel(self) -> None:
        """Stop the running generation at its next step; it raises CancelledError. Any thread."""
        self._cancelled.set()

    def metadata(self, settings: Settings) -> dict[str, Any]:
        """How a video was made: what goes into the file beside the frames."""
        return {
            "software": f"wantrt {__version__}",
            "variant": self.variant.name,
            "bundle": self.bundle.fingerprint,
            "runtime": self.runtime.name,
            "precision": dict(self.bundle.precision),
            **settings.as_dict(),
        }

    def close(self) -> None:
        """Free sessions and weights. The pipeline cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            del self.text_encoder, self.transformers, self.decoder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- One generation ---------------------------------------------------------------------------

    def _settings(self, prompt: str | Settings, settings: Mapping[str, Any]) -> Settings:
        if isinstance(prompt, str):
            return self.resolve(prompt, **settings)
        if settings:
            raise SettingsError("settings are resolved already; give no more of them")
        return prompt

    def _generate(
        self,
        settings: Settings,
        init_latents: Tensor | None,
        callback: Callback | None,
        timings: dict[str, float] | None,
    ) -> Iterator[Frames]:
        if self._closed:
            raise ExecutionError("this pipeline is closed; load it again")
        if not self._busy.acquire(blocking=False):
            raise ExecutionError(
                "this pipeline is already generating: one generation at a time. Finish or close "
                "the other stream, or load a second pipeline"
            )
        self._cancelled.clear()
        clock = _Clock({} if timings is None else timings)

        def report(stage: str, done: int, total: int, latents: Tensor | None = None) -> None:
            wanted = callback(Progress(stage, done, total, latents)) if callback else None
            if wanted is False or self._cancelled.is_set():
                raise CancelledError(f"cancelled in {stage}, after {done} of {total}")

        try:
            with torch.inference_mode(), self.device.stream():
                grid = self._grid(settings)
                noise = self._start(settings, init_latents)
                embeds = self._embed(settings, report)
                clock.lap("text_s")
                denoiser = Denoiser(
                    self._stages(settings, grid), grid, settings.solver, self.device
                )
                latent = noise
                steps = denoiser.run(noise, embeds[:1], embeds[1:])
                for done, latent in enumerate(steps, 1):
                    report("denoise", done, settings.num_inference_steps, latent)
                if not torch.isfinite(latent).all():
                    raise ExecutionError(
                        "the latents became NaN or infinite while denoising. Are the weights "
                        f"sound? wantrt verify --bundle {self.bundle.path}"
                    )
                clock.lap("denoise_s")
            total = latent.shape[2]
            with torch.inference_mode(), self.device.stream():
                chunks = self.decoder.decode(latent)
            for done in range(1, total + 1):
                with torch.inference_mode(), self.device.stream():
                    frames = to_frames(next(chunks)).numpy()
                clock.lap("decode_s")
                report("decode", done, total)
                yield frames
                clock.restart()
        finally:
            self._busy.release()

    def _grid(self, settings: Settings) -> Grid:
        return make_grid(
            settings.solver, settings.convention, settings.num_inference_steps, settings.flow_shift
        )

    def _start(self, settings: Settings, init_latents: Tensor | None) -> Tensor:
        """The latent that denoising starts from, [1, C, F, H, W] on the device."""
        shape = settings.latent_shape(self.variant)
        if init_latents is None:
            noise = draw_noise(shape, settings.seed, settings.noise)
        else:
            noise = init_latents
            if tuple(noise.shape) != (1, *shape):
                raise SettingsError(
                    f"init_latents have shape {list(noise.shape)}; "
                    f"{settings.size[0]}x{settings.size[1]}, {settings.num_frames} frames need "
                    f"{[1, *shape]}"
                )
        return noise.to(self.device.torch_device)

    def _embed(self, settings: Settings, report: Callable[[str, int, int], None]) -> Tensor:
        """Text embeddings of the prompt and, if guidance needs it, of the negative prompt after it.

        [1 or 2, text_len, text_dim].
        """
        guided = any(scale != 1.0 for scale in settings.guidance_scales)
        prompts = [settings.prompt] + ([settings.negative_prompt] if guided else [])
        return self.text_encoder.encode(prompts, lambda done, total: report("text", done, total))

    def _stages(self, settings: Settings, grid: Grid) -> list[Stage]:
        """Each expert with the steps it serves."""
        total = grid.num_inference_steps
        boundary = self.variant.boundary_ratio
        high = total if boundary is None else count_high_noise_steps(grid, boundary)
        steps = [range(high)] if boundary is None else [range(high), range(high, total)]
        return [
            Stage(transformer, steps, scale)
            for transformer, steps, scale in zip(
                self.transformers, steps, settings.guidance_scales, strict=True
            )
        ]


class _Clock:
    """Seconds by phase, added up."""

    def __init__(self, timings: dict[str, float]) -> None:
        self.timings, self.start = timings, time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.timings[phase] = self.timings.get(phase, 0.0) + now - self.start
        self.start = now

    def restart(self) -> None:
        self.start = time.perf_counter()
