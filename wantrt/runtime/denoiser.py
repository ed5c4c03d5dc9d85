"""Denoising loop: text embeddings and noise in, a clean latent out.

One step is patch → stacks → head → guidance → solver update, all on the device and on buffers that
stay where they are, so a step is captured once and replayed; the host only writes the step's index.
Which expert runs is a matter of where its steps lie in the schedule; the solver's state goes on
across the switch.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrt.config import GUIDANCE_BATCH_TOKENS, DiTConfig
from wantrt.device import Device
from wantrt.models.dit import rope_tables, timestep_sinusoid
from wantrt.runtime.capture import Repeated
from wantrt.runtime.fused import step_for
from wantrt.runtime.slots import Handover
from wantrt.schedulers.grids import Grid
from wantrt.schedulers.solver import Solver
from wantrt.schedulers.tables import make_table
from wantrt.session import Session, TensorSpec
from wantrt.tasks.conditioning import NO_CONDITIONING, Conditioning

KEPT_LOOPS = 2  # latent shapes and step counts whose buffers and captured steps stay


@dataclass(frozen=True, eq=False)
class Transformer:
    """One expert's sessions. `leave` is called when its steps are done."""

    config: DiTConfig
    sessions: Mapping[str, Sequence[Session]]
    name: str = "transformer"
    leave: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Stage:
    """A run of steps by one transformer at one guidance scale. Scale 1 skips the second pass.

    handover: to the transformer of the next stage, if that needs the memory of this one.
    """

    transformer: Transformer
    steps: range
    guidance_scale: float
    handover: Handover | None = None


class Denoiser:
    """Runs schedules, one after another.

    What a run has captured serves the next one of the same latent shape and number of steps: other
    prompts, seeds, guidance scales, solvers and shifts are contents, copied into the same buffers.
    `keep=False` frees an expert's buffers when its steps are done. `captures=False` is for sessions
    whose weights are streamed: their copies are ordered by events that a graph does not record.
    """

    def __init__(self, device: Device, *, captures: bool = True, keep: bool = True) -> None:
        self.device, self.captures, self.keep = device, captures, keep
        self._loops: OrderedDict[tuple[object, ...], _Loop] = OrderedDict()

    def run(
        self,
        stages: Sequence[Stage],
        grid: Grid,
        solver: str,
        noise: Tensor,
        embeds: Tensor,
        negative_embeds: Tensor,
        conditioning: Conditioning = NO_CONDITIONING,
    ) -> Generator[Tensor]:
        """Denoise; yields the latent after every step, the same tensor updated in place.

        noise: [1, C, F, H, W]; embeds, negative_embeds: [1, text_len, text_dim]; conditioning: of
        the same F, H, W. The latent stays as it is until the next run.
        """
        loop = self._loop(tuple(noise.shape), grid.num_inference_steps)
        loop.solver.load(make_table(solver, grid.sigmas))
        loop.solver.reset(noise)
        if conditioning.first_frame is not None:
            loop.solver.sample[:, :, :1].copy_(conditioning.first_frame)
        for stage in stages:
            if not stage.steps:
                continue
            text_embeds = embeds
            if stage.guidance_scale != 1.0:
                text_embeds = torch.cat((embeds, negative_embeds))
            try:
                yield from loop.run(stage, grid, text_embeds, conditioning)
            finally:
                if not self.keep:
                    loop.expert_runs.clear()
                stage.transformer.leave()

    def forget(self) -> None:
        """Free all buffers and captured steps."""
        self._loops.clear()

    def _loop(self, shape: tuple[int, ...], num_steps: int) -> "_Loop":
        if not self.keep:
            return _Loop(shape, num_steps, self.device, self.captures)
        key = (shape, num_steps)
        if key not in self._loops:
            while len(self._loops) >= KEPT_LOOPS:
                self._loops.popitem(last=False)
            self._loops[key] = _Loop(shape, num_steps, self.device, self.captures)
        self._loops.move_to_end(key)
        return self._loops[key]


class _Loop:
    """The latent, the solver's state and the step index, for one latent shape and step count."""

    def __init__(
        self, shape: tuple[int, ...], num_steps: int, device: Device, captures: bool
    ) -> None:
        self.num_steps, self.device, self.captures = num_steps, device, captures
        table = torch.zeros(num_steps, 4).numpy()
        take = step_for(device.torch_device)
        self.solver = Solver(table, shape, device.torch_device, take)
        self.index = device.empty((1,), torch.int64)
        self.expert_runs: dict[
            tuple[Transformer, bool, Hashable], tuple[_ExpertRun, Callable[[], None]]
        ] = {}

    def run(
        self, stage: Stage, grid: Grid, text_embeds: Tensor, conditioning: Conditioning
    ) -> Generator[Tensor]:
        guided = len(text_embeds) == 2
        key = (stage.transformer, guided, conditioning.kind)
        if key not in self.expert_runs:
            made = _ExpertRun(self, stage.transformer, guided, conditioning)
            step = Repeated(made.what, made.step, self.device) if self.captures else made.step
            self.expert_runs[key] = made, step
        expert_run, take_step = self.expert_runs[key]
        expert_run.prepare(stage, grid, text_embeds, conditioning)
        for index in stage.steps:
            self.index.fill_(index)
            if stage.handover is None:
                take_step()
            elif index < stage.steps[-1]:
                take_step()
                stage.handover.prepare(stage.steps[-1] - index)
            else:
                expert_run.step(stage.handover.done)
            yield self.solver.sample


@dataclass(frozen=True, eq=False)
class _Pass:
    """The buffers of a pass, or of both in a batch. texts: context and image_context.

    chain: the tokens of VACE's second chain of blocks.
    """

    hidden: Tensor
    velocity: Tensor
    texts: Mapping[str, Tensor]
    chain: Tensor | None


class _ExpertRun:
    """One expert at work in a loop, with guidance or without: its tables, buffers and step.

    With guidance there are two passes: in a batch, or one after the other where the latent has many
    tokens. What is listed in `passes` has one entry for each that runs by itself. What steers the
    generation besides text is copied into buffers here, so that a captured step serves any of it.
    """

    def __init__(
        self, loop: _Loop, transformer: Transformer, guided: bool, conditioning: Conditioning
    ) -> None:
        self.solver, self.index, self.sessions = loop.solver, loop.index, transformer.sessions
        config, device = transformer.config, loop.device
        self.config, self.device = config, device
        channels, frames, height, width = loop.solver.sample.shape[1:]
        self.cos, self.sin = rope_tables(config, frames, height, width, device.torch_device)
        tokens = len(self.cos)
        self.frame_tokens = tokens // (frames // config.patch_size[0])
        passes = 2 if guided else 1
        batch = passes if tokens <= GUIDANCE_BATCH_TOKENS else 1
        _, ph, pw = config.patch_size
        features = conditioning.image_features
        symbols = {
            "B": batch,
            "F": frames,
            "h": height // ph,
            "w": width // pw,
            "L": tokens,
            "T": loop.num_steps,
            "N": 0 if features is None else features.shape[1],
        }

        def make(spec: TensorSpec) -> Tensor:
            return device.empty(spec.concrete(symbols), spec.dtype)

        time, patch, stack, head = (
            self.sessions[name][0] for name in ("dit_time", "dit_patch", "dit_stack", "dit_head")
        )
        self.all_e, self.all_e6 = make(time.outputs["e"]), make(time.outputs["e6"])
        self.e, self.e6 = make(head.inputs["e"]), make(stack.inputs["e6"])  # the step's
        self.latent = make(patch.inputs["latent"])
        self.noisy = self.latent[:, :channels]  # what the condition's channels stand behind
        self.spare = make(stack.inputs["hidden"])
        self.passes = [
            _Pass(
                hidden=make(stack.inputs["hidden"]),
                velocity=make(head.outputs["velocity"]),
                texts={
                    name: make(stack.inputs[name])
                    for name in ("context", "image_context")
                    if name in stack.inputs
                },
                chain=make(stack.inputs["hidden"]) if "hint" in stack.inputs else None,
            )
            for _ in range(passes // batch)
        ]
        self.given = {"e6": self.e6, "cos": self.cos, "sin": self.sin}
        self.rows: dict[str, Tensor] = {}
        if "token_row" in stack.inputs:
            self.rows["token_row"] = make(stack.inputs["token_row"])
        self.first_frame: Tensor | None = None
        if conditioning.first_frame is not None:
            self.first_frame = device.empty(tuple(conditioning.first_frame.shape), torch.float32)
        self.hints: dict[str, Tensor] = {}
        if "hint" in stack.inputs:
            start = self.sessions["dit_vace_start"][0]
            self.vace_context = make(start.inputs["vace_context"])
            self.hints = {name: make(stack.inputs[name]) for name in ("hint", "hint_scale")}
        self.guidance_scale = device.empty((1,), torch.float32) if guided else None
        self.what = f"the denoising step of {transformer.name} ({tokens} tokens, {passes} passes)"

    def prepare(
        self, stage: Stage, grid: Grid, text_embeds: Tensor, conditioning: Conditioning
    ) -> None:
        """Fill in what does not change from step to step."""
        rows = slice(stage.steps.start, stage.steps.stop)
        self._modulate(torch.from_numpy(grid.timesteps[rows]), self.all_e[rows], self.all_e6[rows])
        if self.rows:
            row = self.rows["token_row"].fill_(1)
            if self.first_frame is not None:
                row[: self.frame_tokens] = 0
            e, e6 = torch.empty_like(self.all_e[:1]), torch.empty_like(self.all_e6[:1])
            self._modulate(torch.zeros(1, dtype=torch.float64), e, e6)
            self.e[:, 0], self.e6[:, 0] = e, e6  # of what is clean: its noise level is 0
        if self.first_frame is not None and conditioning.first_frame is not None:
            self.first_frame.copy_(conditioning.first_frame)
        if conditioning.channels is not None:
            self.latent[:, self.noisy.shape[1] :].copy_(conditioning.channels)
        if conditioning.vace_context is not None:
            self.vace_context.copy_(conditioning.vace_context)
            self.hints["hint_scale"].fill_(conditioning.vace_scale)
        features = {}
        if conditioning.image_features is not None:
            image = conditioning.image_features.to(self.device.torch_device)
            features["image_features"] = image.expand(len(text_embeds), -1, -1).contiguous()
        found = self.sessions["dit_condition"][0].run({"text_embeds": text_embeds, **features})
        for name, context in found.items():
            batch = len(self.passes[0].texts[name])
            for own, rows_of_context in zip(self.passes, context.split(batch), strict=True):
                own.texts[name].copy_(rows_of_context)
        if self.guidance_scale is not None:
            self.guidance_scale.fill_(stage.guidance_scale)

    def _modulate(self, timesteps: Tensor, e: Tensor, e6: Tensor) -> None:
        """Modulation of timesteps [T] into e [T, C] and e6 [T, 6, C]."""
        sinusoid = timestep_sinusoid(timesteps, self.config.freq_dim).to(self.device.torch_device)
        self.sessions["dit_time"][0].run({"sinusoid": sinusoid}, {"e": e, "e6": e6})

    def step(self, done: Callable[[str, int], None] = lambda component, instance: None) -> None:
        """One step of the loop's latent, at the loop's index.

        done: told of each instance of a component when it has run for every pass.
        """
        self.noisy.copy_(self.solver.sample.expand_as(self.noisy))
        self.e[:, -1].copy_(self.all_e.index_select(0, self.index).expand_as(self.e[:, -1]))
        self.e6[:, -1].copy_(self.all_e6.index_select(0, self.index).expand_as(self.e6[:, -1]))
        first, *others = self.passes
        self.sessions["dit_patch"][0].run({"latent": self.latent}, {"hidden": first.hidden})
        done("dit_patch", 0)
        for other in others:
            other.hidden.copy_(first.hidden)
        for own, hidden in zip(self.passes, self._run_stacks(done), strict=True):
            head = {"hidden": hidden, "e": self.e, "latent": self.latent, **self.rows}
            self.sessions["dit_head"][0].run(head, {"velocity": own.velocity})
        done("dit_head", 0)
        velocities = [row for own in self.passes for row in own.velocity.split(1)]
        unconditional = velocities[1] if len(velocities) > 1 else None
        self.solver.step(velocities[0], self.index, unconditional, self.guidance_scale)
        if self.first_frame is not None:
            self.solver.sample[:, :, :1].copy_(self.first_frame)

    def _run_stacks(self, done: Callable[[str, int], None]) -> list[Tensor]:
        """Every stack for every pass: its weights are used for both while they are at hand.

        Buffers change places on the way. Returns those that hold the results.
        """
        hidden, spare = [own.hidden for own in self.passes], self.spare
        chains = [own.chain for own in self.passes if own.chain is not None]
        for chain, start in zip(chains, hidden, strict=False):
            inputs = {"vace_context": self.vace_context, "hidden": start}
            self.sessions["dit_vace_start"][0].run(inputs, {"vace_hidden": chain})
        done("dit_vace_start", 0)
        stacks = self.sessions["dit_stack"]
        hints = self._hints_of_stacks() if self.hints else {}
        for index, stack in enumerate(stacks):
            for i, own in enumerate(self.passes):
                given = {**self.given, "context": own.texts["context"]}
                if index in hints:
                    self.sessions["dit_vace_block"][hints[index]].run(
                        {"vace_hidden": chains[i], **given},
                        {"vace_hidden_out": spare, "hint": self.hints["hint"]},
                    )
                    chains[i], spare = spare, chains[i]
                elif self.hints:
                    self.hints["hint"].zero_()
                stack.run(
                    {"hidden": hidden[i], **given, **own.texts, **self.rows, **self.hints},
                    {"hidden_out": spare},
                )
                hidden[i], spare = spare, hidden[i]
            done("dit_stack", index)
            if index in hints:
                done("dit_vace_block", hints[index])
        return hidden

    def _hints_of_stacks(self) -> dict[int, int]:
        """Stack -> the VACE block whose hint enters behind its first block."""
        size = self.config.num_layers // len(self.sessions["dit_stack"])
        return {layer // size: number for number, layer in enumerate(self.config.vace_layers)}
