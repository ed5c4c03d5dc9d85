"""Denoising loop: text embeddings and noise in, a clean latent out.

One step is patch → stacks → head → guidance → solver update, all on the device and on buffers that
stay where they are, so a step is captured once and replayed; the host only writes the step's index.
Which expert runs is a matter of where its steps lie in the schedule; the solver's state goes on
across the switch.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrt.config import GUIDANCE_BATCH_TOKENS, DiTConfig
from wantrt.device import Device
from wantrt.models.dit import rope_tables, timestep_sinusoid
from wantrt.runtime.capture import Repeated
from wantrt.runtime.fused import step_for
from wantrt.schedulers.grids import Grid
from wantrt.schedulers.solver import Solver
from wantrt.schedulers.tables import make_table
from wantrt.session import Session, TensorSpec

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
    """A run of steps by one transformer at one guidance scale. Scale 1 skips the second pass."""

    transformer: Transformer
    steps: range
    guidance_scale: float


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
    ) -> Generator[Tensor]:
        """Denoise; yields the latent after every step, the same tensor updated in place.

        noise: [1, C, F, H, W]; embeds, negative_embeds: [1, text_len, text_dim]. The latent stays
        as it is until the next run.
        """
        loop = self._loop(tuple(noise.shape), grid.num_inference_steps)
        loop.solver.load(make_table(solver, grid.sigmas))
        loop.solver.reset(noise)
        for stage in stages:
            if not stage.steps:
                continue
            text_embeds = embeds
            if stage.guidance_scale != 1.0:
                text_embeds = torch.cat((embeds, negative_embeds))
            try:
                yield from loop.run(stage, grid, text_embeds)
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
        self.expert_runs: dict[tuple[Transformer, bool], tuple[_ExpertRun, Callable[[], None]]] = {}

    def run(self, stage: Stage, grid: Grid, text_embeds: Tensor) -> Generator[Tensor]:
        guided = len(text_embeds) == 2
        key = (stage.transformer, guided)
        if key not in self.expert_runs:
            made = _ExpertRun(self, stage.transformer, guided)
            step = Repeated(made.what, made.step, self.device) if self.captures else made.step
            self.expert_runs[key] = made, step
        expert_run, take_step = self.expert_runs[key]
        expert_run.prepare(stage, grid, text_embeds)
        for index in stage.steps:
            self.index.fill_(index)
            take_step()
            yield self.solver.sample


class _ExpertRun:
    """One expert at work in a loop, with guidance or without: its tables, buffers and step.

    With guidance there are two passes: in a batch, or one after the other where the latent has many
    tokens. `contexts`, `hidden` and `velocities` have one entry for each that runs by itself.
    """

    def __init__(self, loop: _Loop, transformer: Transformer, guided: bool) -> None:
        self.solver, self.index, self.sessions = loop.solver, loop.index, transformer.sessions
        config, device = transformer.config, loop.device
        self.config, self.device = config, device
        _, _, frames, height, width = loop.solver.sample.shape
        self.cos, self.sin = rope_tables(config, frames, height, width, device.torch_device)
        tokens = len(self.cos)
        passes = 2 if guided else 1
        batch = passes if tokens <= GUIDANCE_BATCH_TOKENS else 1
        _, ph, pw = config.patch_size
        symbols = {
            "B": batch,
            "F": frames,
            "h": height // ph,
            "w": width // pw,
            "L": tokens,
            "T": loop.num_steps,
        }

        def make(spec: TensorSpec) -> Tensor:
            return device.empty(spec.concrete(symbols), spec.dtype)

        time, patch, stack, head = (
            self.sessions[name][0] for name in ("dit_time", "dit_patch", "dit_stack", "dit_head")
        )
        self.all_e, self.all_e6 = make(time.outputs["e"]), make(time.outputs["e6"])
        self.e, self.e6 = make(head.inputs["e"]), make(stack.inputs["e6"])  # the step's
        self.latent = make(patch.inputs["latent"])
        self.contexts = [make(stack.inputs["context"]) for _ in range(passes // batch)]
        self.hidden = [make(stack.inputs["hidden"]) for _ in self.contexts]
        self.spare = make(stack.inputs["hidden"])
        self.velocities = [make(head.outputs["velocity"]) for _ in self.contexts]
        self.guidance_scale = device.empty((1,), torch.float32) if guided else None
        self.what = f"the denoising step of {transformer.name} ({tokens} tokens, {passes} passes)"

    def prepare(self, stage: Stage, grid: Grid, text_embeds: Tensor) -> None:
        """Fill in what does not change from step to step: modulation, context, guidance scale."""
        rows = slice(stage.steps.start, stage.steps.stop)
        timesteps = torch.from_numpy(grid.timesteps[rows])
        sinusoid = timestep_sinusoid(timesteps, self.config.freq_dim).to(self.device.torch_device)
        self.sessions["dit_time"][0].run(
            {"sinusoid": sinusoid}, {"e": self.all_e[rows], "e6": self.all_e6[rows]}
        )
        context = self.sessions["dit_condition"][0].run({"text_embeds": text_embeds})["context"]
        for own, rows_of_context in zip(
            self.contexts, context.split(len(self.contexts[0])), strict=True
        ):
            own.copy_(rows_of_context)
        if self.guidance_scale is not None:
            self.guidance_scale.fill_(stage.guidance_scale)

    def step(self) -> None:
        """One step of the loop's latent, at the loop's index."""
        self.latent.copy_(self.solver.sample.expand_as(self.latent))
        self.e.copy_(self.all_e.index_select(0, self.index).expand_as(self.e))  # [B, R=1, C]
        self.e6.copy_(self.all_e6.index_select(0, self.index).expand_as(self.e6))  # [B, 1, 6, C]
        hidden, spare = list(self.hidden), self.spare
        self.sessions["dit_patch"][0].run({"latent": self.latent}, {"hidden": hidden[0]})
        for other in hidden[1:]:
            other.copy_(hidden[0])
        for stack in self.sessions["dit_stack"]:  # both passes per stack: weights are used twice
            for i, context in enumerate(self.contexts):
                inputs = {
                    "hidden": hidden[i],
                    "e6": self.e6,
                    "context": context,
                    "cos": self.cos,
                    "sin": self.sin,
                }
                stack.run(inputs, {"hidden_out": spare})
                hidden[i], spare = spare, hidden[i]
        for rows, velocity in zip(hidden, self.velocities, strict=True):
            self.sessions["dit_head"][0].run(
                {"hidden": rows, "e": self.e, "latent": self.latent}, {"velocity": velocity}
            )
        passes = [row for velocity in self.velocities for row in velocity.split(1)]
        unconditional = passes[1] if len(passes) > 1 else None
        self.solver.step(passes[0], self.index, unconditional, self.guidance_scale)
