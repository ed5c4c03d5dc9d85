"""Text to video from a bundle.

    with Pipeline.load("my-bundle") as pipe:
        video = pipe("a cat surfing", seed=42)
        video.save("cat.mp4")

The same seed on the same machine and runtime gives the same bits. A pipeline serves one generation
at a time; a second one, from whichever thread, is refused.

What lies in the device's memory is a policy (wantrt/runtime/residency.py). On a GPU a denoising
step and the decoder's chunks are captured after their first run and replayed, also by later
generations of the same size; under `stream` denoising is not captured.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wantrt import __version__
from wantrt.bundle import Bundle
from wantrt.config import Size, Variant, require_task
from wantrt.device import CPUDevice, Device
from wantrt.errors import CancelledError, ExecutionError, SettingsError
from wantrt.images import Pixels
from wantrt.media import Video
from wantrt.names import check_name
from wantrt.runtime.decoder import Decoder, to_frames
from wantrt.runtime.denoiser import Denoiser, Stage, Transformer
from wantrt.runtime.encoder import encode
from wantrt.runtime.loading import RUNTIMES, Runtime, choose_for
from wantrt.runtime.memory import PhaseMemory, check_memory, phases, predict, weights_alone
from wantrt.runtime.parts import is_bound, load_part
from wantrt.runtime.prompt import Tokenizer
from wantrt.runtime.residency import POLICIES, ExpertPart, Part, Sessions, Turns
from wantrt.runtime.scratch import KERNELS, REFERENCE
from wantrt.runtime.settings import Settings
from wantrt.runtime.sizes import (
    DIT_STEP,
    VAE_DECODER,
    check_served,
    dit_symbols,
    resolve_for,
    vae_symbols,
)
from wantrt.runtime.slots import slot_sizes
from wantrt.runtime.text import TextEncoder
from wantrt.schedulers.grids import Grid, make_grid, split_steps
from wantrt.schedulers.noise import draw_noise
from wantrt.session import Session
from wantrt.tasks.clip_image import clip_pixels
from wantrt.tasks.conditioning import Conditioning
from wantrt.tasks.source import TAKES, make_conditioning

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
        parts: Mapping[str, Part],
        residency: str = "resident",
    ) -> None:
        """parts: as the policy `residency` loads them. "text_encoder", each expert, "vae" (the
        decoder), and where a task needs them "vae_encoder" and "image_encoder"."""
        variant, keep = bundle.variant, residency == "resident"
        self.bundle, self.runtime, self.device = bundle, runtime, device
        self.parts, self.residency = dict(parts), residency
        text = self.parts["text_encoder"]
        tokenizer = Tokenizer(bundle.tokenizer, variant.experts[0].dit.text_len)
        self.text_encoder = TextEncoder(variant.text_encoder, tokenizer, text, text.device)
        self.transformers = [
            Transformer(expert.dit, part, expert.name, part.leave)
            for expert in variant.experts
            for part in [self.parts[expert.name]]
        ]
        self.denoiser = Denoiser(device, captures=residency != "stream", keep=keep)
        self.decoder = Decoder(variant.vae, self.parts["vae"], device, keep=keep)
        self._fitting: set[tuple[Size, int]] = set()  # what was found to have memory enough
        self._busy = threading.Lock()
        self._cancelled = threading.Event()
        self._closed = False

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        runtime: str | None = None,
        *,
        residency: str = "resident",
        text_encoder_on: str | None = None,
        trust_plans: bool = False,
    ) -> "Pipeline":
        """Load a bundle, from its folder or open already; "nano" (None) and "nano-i2v" ship.

        runtime: "tensorrt", "tensorrt-rtx", "onnxruntime" or "torch"; None takes the best one that
        bundle and machine share. residency: "resident", "phase" or "stream", which need less and
        less memory of a GPU (wantrt/runtime/residency.py). text_encoder_on: "cpu" runs it there,
        with torch. trust_plans: run plans that another machine compiled; otherwise they are
        compiled again from the bundle's graphs. Raises BundleError, RuntimeUnavailableError,
        UnsupportedTaskError, SettingsError.
        """
        check_name("residency", residency, POLICIES)
        check_name("place of the text encoder", text_encoder_on or "cpu", ("cpu",))
        from wantrt.build import open_bundle

        loaded = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        variant = loaded.variant
        require_task(variant.task, variant.name)
        chosen = choose_for(loaded, runtime)
        device = chosen.make_device()

        def part(name: str, runtime: Runtime, device: Device, prefix: str = "") -> Part:
            def load() -> dict[str, Sequence[Session]]:
                return load_part(
                    loaded,
                    name,
                    runtime,
                    device,
                    prefix=prefix,
                    streamed=residency == "stream" and runtime is chosen,
                    trust_plans=trust_plans,
                )

            return Part(load, device, resident=residency == "resident")

        parts = {name: part(name, chosen, device) for name in loaded.precision}
        if residency == "phase" and device.architecture != "cpu":
            parts |= _take_turns(loaded, chosen, device, trust_plans)
        parts["vae"] = part("vae", chosen, device, "vae_decoder")
        if any(TAKES[variant.task]):
            parts["vae_encoder"] = part("vae", chosen, device, "vae_encoder")
        if text_encoder_on == "cpu":
            parts["text_encoder"] = part("text_encoder", RUNTIMES["torch"], CPUDevice())
        pipe = cls(loaded, chosen, device, parts, residency)
        if residency == "resident":
            alone = [weights_alone(phase) for phase in pipe._phases(variant.size, 1)]
            check_memory(alone, residency, device, what=f"the weights of {loaded.path}")
            try:
                for resident in parts.values():
                    resident.load()
            except torch.OutOfMemoryError as error:
                raise _memory_is_full(error) from None
        return pipe

    @property
    def variant(self) -> Variant:
        return self.bundle.variant

    def resolve(self, prompt: str, **settings: Any) -> Settings:
        """The settings that a call with these arguments runs with; raises what it would raise.

        The default size is the variant's, or the first that the bundle's plans serve.
        """
        return resolve_for(self.bundle, self.runtime.name, prompt=prompt, **settings)

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
        num_inference_steps, guidance_scale (the first expert's), guidance_scale_2 (that of those
        after it) or guidance_scales (one an expert), flow_shift, solver, convention, seed, noise,
        and what the task takes: image, last_image, video, mask, reference_images (paths, PIL
        images or arrays), fit, context_scale; or `prompt` is what `resolve` returned. init_latents:
        [1, C, F, H, W] in the place of the noise. callback: called with `Progress` after every
        piece of work; returning False cancels (CancelledError). timings: filled with seconds by
        phase.
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
            "experts": {
                expert.name: list(sigmas)
                for expert, sigmas in zip(
                    self.variant.experts, self.variant.sigma_ranges, strict=True
                )
            },
            "bundle": self.bundle.fingerprint,
            "runtime": self.runtime.name,
            "precision": dict(self.bundle.precision),
            **settings.as_dict(),
        }

    def close(self) -> None:
        """Free sessions and weights. The pipeline cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            self.denoiser.forget()
            self.decoder.forget()
            for part in self.parts.values():
                part.free()
            del self.text_encoder, self.transformers, self.denoiser, self.decoder
            self.parts.clear()

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
        check_served(self.bundle, self.runtime.name, prompt)
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
        clock = _Clock({} if timings is None else timings, self.device)

        def report(stage: str, done: int, total: int, latents: Tensor | None = None) -> None:
            wanted = callback(Progress(stage, done, total, latents)) if callback else None
            if wanted is False or self._cancelled.is_set():
                raise CancelledError(f"cancelled in {stage}, after {done} of {total}")

        steps: Generator[Tensor] | None = None
        chunks: Generator[Tensor] | None = None
        try:
            self._check_memory(settings)
            with torch.inference_mode(), self.device.stream():
                self._prepare(settings)
                grid = self._grid(settings)
                noise = self._start(settings, init_latents)
                embeds = self._embed(settings, report)
                self.parts["text_encoder"].leave()
                clock.lap("text_s")
                conditioning = self._condition(settings)
                if settings.source.names:
                    clock.lap("encode_s")
                latent = noise
                steps = self.denoiser.run(
                    self._stages(settings, grid),
                    grid,
                    settings.solver,
                    noise,
                    embeds[:1],
                    embeds[1:],
                    conditioning,
                )
                for done, latent in enumerate(steps, 1):
                    report("denoise", done, settings.num_inference_steps, latent)
                if not torch.isfinite(latent).all():
                    raise ExecutionError(
                        "the latents became NaN or infinite while denoising. Are the weights "
                        f"sound? wantrt verify --bundle {self.bundle.path}"
                    )
                latent = latent[:, :, conditioning.reference_frames :]
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
        except torch.OutOfMemoryError as error:
            raise _memory_is_full(error) from None
        finally:
            for running in (steps, chunks):
                if running is not None:
                    running.close()
            for part in self.parts.values():
                part.leave()
            self._busy.release()

    def _check_memory(self, settings: Settings) -> None:
        """Raises SettingsError before a first generation of a size that will not fit."""
        asked = (settings.size, settings.denoised_frames(self.variant))
        if asked in self._fitting:
            return
        needed = self._phases(*asked)
        what = f"{settings.size[0]}x{settings.size[1]} with {settings.num_frames} frames"
        loaded = 0
        if self.residency == "resident" and self.device.torch_device.type != "cpu":
            loaded = predict(needed, self.residency).weights_bytes
        try:
            check_memory(needed, self.residency, self.device, loaded, what)
        except SettingsError:  # perhaps for what other sizes keep
            self.denoiser.forget()
            self.decoder.forget()
            self._fitting.clear()
            check_memory(needed, self.residency, self.device, loaded, what)
        self._fitting.add(asked)

    def _prepare(self, settings: Settings) -> None:
        """Let resident sessions reserve scratch: one arena, made before anything is captured."""
        if self.residency != "resident":
            return
        cells = vae_symbols(self.variant, settings.size)
        for sessions in (self.parts["vae"][name] for name in VAE_DECODER):
            _prepare_sessions(sessions, cells)
        for expert, scale in zip(self.variant.experts, settings.guidance_scales, strict=True):
            self._prepare_expert(self.parts[expert.name], settings, scale)

    def _prepare_expert(
        self, sessions: Sessions, settings: Settings, guidance_scale: float
    ) -> None:
        frames = settings.denoised_frames(self.variant)
        symbols = dit_symbols(self.variant, settings.size, frames, guided=guidance_scale != 1.0)
        for name in DIT_STEP:
            _prepare_sessions(sessions[name], symbols)

    def _phases(self, size: Size, num_frames: int) -> list[PhaseMemory]:
        """What the parts that run on the device take."""
        bundle = self.bundle
        stacks = {part: bundle.stack_of(part) for part in bundle.precision}
        ops = REFERENCE if self.device.torch_device.type == "cpu" else KERNELS
        return [
            phase
            for phase in phases(self.variant, bundle.precision, size, num_frames, stacks, ops)
            if self.parts[phase.part].device is self.device
        ]

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
        embeds = self.text_encoder.encode(prompts, lambda done, total: report("text", done, total))
        return embeds.to(self.device.torch_device)

    def _condition(self, settings: Settings) -> Conditioning:
        """What the source of a generation gives to the denoising loop."""
        source, config = settings.source, self.variant.vae
        encoder: Mapping[str, Sequence[Session]] = self.parts.get("vae_encoder", {})

        def encode_images(images: Sequence[Pixels]) -> Tensor:
            """One after the other: a plan of the encoder is for one image."""
            self.parts["vae_encoder"].leave()  # it is done
            size = self.parts["image_encoder"]["image_encoder"][0].inputs["pixels"].shape[-1]
            rows = []
            for pixels in clip_pixels(images, settings.convention, int(size)).split(1):
                given = {"pixels": pixels.to(self.device.torch_device)}
                (session,) = self.parts["image_encoder"]["image_encoder"]
                rows.append(session.run(given)["features"].clone())
            self.parts["image_encoder"].leave()
            return torch.cat(rows, dim=1)

        made = make_conditioning(
            self.variant,
            source,
            settings.size,
            settings.num_frames,
            settings.fit,
            settings.convention,
            lambda pixels: encode(config, encoder, self.device, pixels),
            encode_images,
        )
        if "vae_encoder" in self.parts:
            self.parts["vae_encoder"].leave()
        return replace(made, vace_scale=settings.context_scale)

    def _stages(self, settings: Settings, grid: Grid) -> list[Stage]:
        """Each expert with the steps it serves, and how it makes room for the next one."""
        steps = split_steps(grid, self.variant.boundary_ratios)
        stages = list(map(Stage, self.transformers, steps, settings.guidance_scales))
        stages = [stage for stage in stages if stage.steps]
        for index, following in enumerate(stages[1:]):
            stage, part = stages[index], self.parts[stages[index].transformer.name]
            handover = part.hand_over_to(self.parts[following.transformer.name])
            if handover is not None:
                for each in (stage, following):  # one arena for both, before anything is captured
                    self._prepare_expert(each.transformer.sessions, settings, each.guidance_scale)
                stages[index] = replace(stage, handover=handover)
        return stages


def _take_turns(
    bundle: Bundle, runtime: Runtime, device: Device, trust_plans: bool
) -> dict[str, Part]:
    """The experts of a bundle as parts that share their memory, if there are several."""
    names = [expert.name for expert in bundle.variant.experts]
    if len(names) == 1 or not all(is_bound(bundle, name, runtime) for name in names):
        return {}
    turns = Turns(slot_sizes(bundle.components(name) for name in names), device)

    def part(name: str) -> Part:
        return ExpertPart(
            lambda: load_part(
                bundle, name, runtime, device, slots=turns.slots, trust_plans=trust_plans
            ),
            turns,
        )

    return {name: part(name) for name in names}


def _memory_is_full(error: torch.OutOfMemoryError) -> ExecutionError:
    """Although it was predicted to suffice: others took some of it, or the prediction is wrong."""
    said, *_ = str(error).split("\n")
    return ExecutionError(
        f"the GPU's memory is full. {said} Take --residency phase or stream, "
        "which need less, a smaller --size or fewer --frames, or end what else runs on the GPU."
    )


def _prepare_sessions(sessions: Sequence[Session], symbols: Mapping[str, int]) -> None:
    for session in sessions:
        names = {name for spec in session.inputs.values() for name in spec.symbol_names}
        session.prepare({name: size for name, size in symbols.items() if name in names})


class _Clock:
    """Seconds by phase, added up; a phase is over when the device has done its work."""

    def __init__(self, timings: dict[str, float], device: Device) -> None:
        self.timings, self.device = timings, device
        self.start = time.perf_counter()

    def lap(self, phase: str) -> None:
        self.device.synchronize()
        now = time.perf_counter()
        self.timings[phase] = self.timings.get(phase, 0.0) + now - self.start
        self.start = now

    def restart(self) -> None:
        self.start = time.perf_counter()
