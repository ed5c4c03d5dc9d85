"""wantrt behind the same methods: a bundle of the same checkpoint, on one of its runtimes."""

import time
from typing import Any

import torch
from torch import Tensor

from wantrt.bench.peers.base import TIMESTEP, Done, Loaded, Work, count_parameters
from wantrt.bench.peers.diffusers_eager import timed, video_done
from wantrt.bundle import Bundle
from wantrt.device import Device
from wantrt.linked import refuse_other_names
from wantrt.models.dit import rope_tables, timestep_sinusoid
from wantrt.runtime.decoder import Decoder
from wantrt.runtime.loading import RUNTIMES
from wantrt.runtime.parts import load_part
from wantrt.runtime.pipeline import Pipeline, Progress

refuse_other_names(__spec__)


class Ours:
    """See `wantrt.bench.peers.base.Engine`."""

    def __init__(self, bundle: Bundle, runtime: str) -> None:
        self.bundle, self.runtime, self.name = bundle, runtime, f"wantrt {runtime}"

    def found_in(self, part: str, prefix: str = "") -> dict[str, Any]:
        """Precision and number of parameters of the components of a part."""
        names = {
            prepared
            for component in self.bundle.components(part)
            if component.name.startswith(prefix)
            for instance in component.instances
            for prepared in instance.values()
        }
        weights = self.bundle.weights(part)
        return {
            "precision": self.bundle.precision[part],
            "parameters": count_parameters({name: weights[name] for name in names}),
        }

    def device(self) -> Device:
        return RUNTIMES[self.runtime].make_device()

    def transformer(self, work: Work) -> Loaded:
        """Time embedding, text projection and patches included, as a peer's module has them."""
        (expert,) = work.variant.experts
        device = self.device()
        sessions = load_part(self.bundle, expert.name, RUNTIMES[self.runtime], device)
        where = device.torch_device
        frames, height, width = work.latents.shape[2:]
        cos, sin = rope_tables(expert.dit, frames, height, width, where)
        assert work.text_embeds is not None
        latent, text_embeds = work.latents.to(where), work.text_embeds.to(where)

        def run() -> Tensor:
            timestep = torch.tensor([TIMESTEP], dtype=torch.float64)
            sinusoid = timestep_sinusoid(timestep, expert.dit.freq_dim).to(where)
            rows = sessions["dit_time"][0].run({"sinusoid": sinusoid})
            context = sessions["dit_condition"][0].run({"text_embeds": text_embeds})
            hidden = sessions["dit_patch"][0].run({"latent": latent})["hidden"]
            given = {"e6": rows["e6"][None], "cos": cos, "sin": sin, **context}
            for stack in sessions["dit_stack"]:
                hidden = stack.run({"hidden": hidden, **given})["hidden_out"]
            head = {"hidden": hidden, "e": rows["e"][None], "latent": latent}
            return sessions["dit_head"][0].run(head)["velocity"]

        def wrapped(_: int) -> Done:
            with device.stream():
                return timed(run)

        return Loaded(self.found_in(expert.name), wrapped)

    def decoder(self, work: Work) -> Loaded:
        device = self.device()
        sessions = load_part(
            self.bundle, "vae", RUNTIMES[self.runtime], device, prefix="vae_decoder"
        )
        decoder = Decoder(work.variant.vae, sessions, device)
        latent = work.latents.to(device.torch_device)

        def run(_: int) -> Done:
            with device.stream():
                return timed(lambda: torch.cat([c.clone() for c in decoder.decode(latent)], dim=2))

        return Loaded(self.found_in("vae", "vae_decoder"), run)

    def pipeline(self, work: Work) -> Loaded:
        pipe = Pipeline.load(self.bundle, self.runtime)
        (expert,) = work.variant.experts
        asked: dict[str, Any] = {
            "negative_prompt": "",
            "size": work.size,
            "num_frames": work.num_frames,
            "num_inference_steps": work.num_inference_steps,
            "guidance_scale": work.guidance_scale,
            "convention": "diffusers",
            "seed": 0,  # what is drawn from it is replaced by the latents
        }
        resolved = pipe.resolve(work.prompt(0), **asked)
        settings = {
            **self.found_in(expert.name),
            "solver": resolved.solver,
            "flow_shift": resolved.flow_shift,
        }

        def run(index: int) -> Done:
            pipe.text_encoder.forget()
            marks = [time.perf_counter()]

            def mark(progress: Progress) -> None:
                if progress.stage == "denoise":
                    pipe.device.synchronize()
                    marks.append(time.perf_counter())

            video = pipe(work.prompt(index), init_latents=work.latents, callback=mark, **asked)
            marks.append(time.perf_counter())
            return video_done(marks, torch.from_numpy(video.frames))

        return Loaded(settings, run)
