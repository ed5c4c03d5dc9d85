"""Denoising loop: text embeddings and noise in, a clean latent out.

One step is patch → stacks → head → guidance → solver update, all on the device; the host only moves
the step index. Which expert runs is a matter of where its steps lie in the schedule; the solver's
state goes on across the switch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrt.config import GUIDANCE_BATCH_TOKENS, DiTConfig
from wantrt.device import Device
from wantrt.models.dit import rope_tables, timestep_sinusoid
from wantrt.schedulers.grids import Grid
from wantrt.schedulers.guidance import guide
from wantrt.schedulers.solver import Solver
from wantrt.schedulers.tables import make_table
from wantrt.session import Session


@dataclass(frozen=True)
class Transformer:
    """One expert's sessions."""

    config: DiTConfig
    sessions: Mapping[str, Sequence[Session]]


@dataclass(frozen=True)
class Stage:
    """A run of steps by one transformer at one guidance scale. Scale 1 skips the second pass."""

    transformer: Transformer
    steps: range
    guidance_scale: float


class Denoiser:
    """Runs the stages of a schedule on one latent."""

    def __init__(self, stages: Sequence[Stage], grid: Grid, solver: str, device: Device) -> None:
        self.stages, self.grid, self.solver, self.device = stages, grid, solver, device

    def run(self, noise: Tensor, embeds: Tensor, negative_embeds: Tensor) -> Iterator[Tensor]:
        """Denoise; yields the latent after every step, the same tensor updated in place.

        noise: [1, C, F, H, W]; embeds, negative_embeds: [1, text_len, text_dim].
        """
        solver = Solver(
            make_table(self.solver, self.grid.sigmas), noise.shape, self.device.torch_device
        )
        solver.reset(noise)
        for stage in self.stages:
            if not stage.steps:
                continue
            guided = stage.guidance_scale != 1.0
            run = _StageRun(stage, self.grid, solver.sample, self.device)
            run.prepare(torch.cat((embeds, negative_embeds)) if guided else embeds)
            for step in stage.steps:
                solver.step(run.velocity(step), step)
                yield solver.sample


class _StageRun:
    """One stage at work: its tables and buffers, allocated once for all its steps."""

    def __init__(self, stage: Stage, grid: Grid, latent: Tensor, device: Device) -> None:
        self.stage, self.grid, self.latent = stage, grid, latent
        self.config, self.sessions = stage.transformer.config, stage.transformer.sessions
        self.where = device.torch_device
        _, _, frames, height, width = latent.shape
        self.cos, self.sin = rope_tables(self.config, frames, height, width, self.where)
        self.batched = self.cos.shape[0] <= GUIDANCE_BATCH_TOKENS

    def prepare(self, text_embeds: Tensor) -> None:
        """What does not change from step to step: modulation of all timesteps, context."""
        timesteps = torch.from_numpy(self.grid.timesteps[self.stage.steps])
        sinusoid = timestep_sinusoid(timesteps, self.config.freq_dim).to(self.where)
        time = self.sessions["dit_time"][0].run({"sinusoid": sinusoid})
        self.e, self.e6 = time["e"].clone(), time["e6"].clone()  # [T, C], [T, 6, C]
        condition = self.sessions["dit_condition"][0]
        context = condition.run({"text_embeds": text_embeds})["context"].clone()
        self.contexts = [context] if self.batched else list(context.split(1))

    def velocity(self, step: int) -> Tensor:
        """Guided velocity of the current latent at a step, [1, C, F, H, W] float32."""
        index = step - self.stage.steps.start
        batch = self.contexts[0].shape[0]
        latent = self.latent.expand(batch, -1, -1, -1, -1).contiguous()
        e = self.e[index].expand(batch, 1, -1).contiguous()  # [B, R=1, C]
        e6 = self.e6[index].expand(batch, 1, -1, -1).contiguous()  # [B, R=1, 6, C]
        hidden = self.sessions["dit_patch"][0].run({"latent": latent})["hidden"]
        passes = [hidden] + [hidden.clone() for _ in self.contexts[1:]]
        spare = torch.empty_like(hidden)
        for stack in self.sessions["dit_stack"]:  # both passes per stack: weights are used twice
            for i, context in enumerate(self.contexts):
                inputs = {
                    "hidden": passes[i],
                    "e6": e6,
                    "context": context,
                    "cos": self.cos,
                    "sin": self.sin,
                }
                stack.run(inputs, {"hidden_out": spare})
                passes[i], spare = spare, passes[i]
        head = self.sessions["dit_head"][0]
        velocities = torch.cat(
            [head.run({"hidden": h, "e": e, "latent": latent})["velocity"].clone() for h in passes]
        )
        if velocities.shape[0] == 1:
            return velocities
        return guide(velocities[:1], velocities[1:], self.stage.guidance_scale)
