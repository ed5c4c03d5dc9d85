"""diffusers as its documentation first shows it: eager PyTorch, its default attention.

https://huggingface.co/docs/diffusers/api/pipelines/wan
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from wantrt.bench.peers.base import TIMESTEP, Done, Loaded, Work
from wantrt.linked import refuse_other_names
from wantrt.runtime.settings import DIFFUSERS_SOLVERS
from wantrt.session import PRECISIONS

refuse_other_names(__spec__)

PRECISION_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


class DiffusersEager:
    """See `wantrt.bench.peers.base.Engine`."""

    name = "diffusers eager"
    packages = ("diffusers", "transformers", "accelerate")

    def prepare_transformer(self, model: Any) -> None:
        """What is done to make it faster: nothing."""

    def prepare_vae(self, vae: Any) -> None:
        """Likewise."""

    def transformer(self, work: Work) -> Loaded:
        from diffusers import WanTransformer3DModel

        be_quiet()
        dtype = PRECISIONS[work.precision]
        (expert,) = work.variant.experts
        model = WanTransformer3DModel.from_pretrained(
            work.checkpoint / expert.diffusers_folder, dtype=dtype
        )
        model.to(work.device).eval()
        self.prepare_transformer(model)
        assert work.text_embeds is not None
        given = (
            work.latents.to(work.device, dtype),
            torch.tensor([TIMESTEP], device=work.device),
            work.text_embeds.to(work.device, dtype),
        )
        return Loaded(found_in(model), lambda _: timed(lambda: model(*given, return_dict=False)[0]))

    def decoder(self, work: Work) -> Loaded:
        from diffusers import AutoencoderKLWan

        be_quiet()
        dtype = PRECISIONS[work.precision]
        vae = AutoencoderKLWan.from_pretrained(work.checkpoint / "vae", dtype=dtype)
        vae.to(work.device).eval()
        self.prepare_vae(vae)
        mean, std = (
            torch.tensor(values, device=work.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = work.latents.to(work.device)

        def decode() -> Tensor:
            pixels: Tensor = vae.decode((latents * std + mean).to(dtype), return_dict=False)[0]
            return pixels

        return Loaded(found_in(vae.decoder, vae.post_quant_conv), lambda _: timed(decode))

    def pipeline(self, work: Work) -> Loaded:
        from diffusers import WanPipeline
        from transformers import PreTrainedTokenizerFast

        be_quiet()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work.checkpoint / "tokenizer")
        pipe = WanPipeline.from_pretrained(
            work.checkpoint, tokenizer=tokenizer, dtype=PRECISIONS[work.precision]
        )
        pipe.to(work.device).set_progress_bar_config(disable=True)
        self.prepare_transformer(pipe.transformer)
        self.prepare_vae(pipe.vae)
        scheduler = pipe.scheduler.config
        settings = {
            **found_in(pipe.transformer),
            "solver": DIFFUSERS_SOLVERS.get(scheduler["_class_name"], scheduler["_class_name"]),
            "flow_shift": float(scheduler.get("flow_shift", scheduler.get("shift", 1.0))),
        }

        def run(index: int) -> Done:
            marks = [time.perf_counter()]

            def mark(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> Any:
                wait_for(work.device)
                marks.append(time.perf_counter())
                return state

            frames = pipe(
                prompt=work.prompt(index),
                negative_prompt="",
                width=work.size[0],
                height=work.size[1],
                num_frames=work.num_frames,
                num_inference_steps=work.num_inference_steps,
                guidance_scale=work.guidance_scale,
                latents=work.latents.to(work.device),
                max_sequence_length=work.variant.experts[0].dit.text_len,
                callback_on_step_end=mark,
            ).frames[0]
            marks.append(time.perf_counter())
            return video_done(marks, torch.from_numpy((frames * 255).astype("uint8")))

        return Loaded(settings, run)


Peer = DiffusersEager


def be_quiet() -> None:
    """No bars and no advice from the libraries."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def found_in(*modules: nn.Module) -> dict[str, Any]:
    """Precision, as that of most parameters, and number of parameters."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    dtypes = [parameter.dtype for parameter in parameters]
    main = max(set(dtypes), key=dtypes.count)
    return {
        "precision": PRECISION_NAMES.get(main, str(main)),
        "parameters": sum(parameter.numel() for parameter in parameters),
    }


def timed(work: Callable[[], Tensor]) -> Done:
    """A run whose result goes to the host, in float32."""
    start = time.perf_counter()
    with torch.inference_mode():
        result = work().float().cpu()
    return Done(time.perf_counter() - start, result)


def video_done(marks: list[float], frames: Tensor) -> Done:
    """A whole video. marks: its beginning, the end of every denoising step, its end."""
    steps = [1e3 * (after - before) for before, after in pairwise(marks[1:-1])]
    stages = {"step_ms": steps, "vae_decode_s": [marks[-1] - marks[-2]]}
    return Done(marks[-1] - marks[0], frames, stages)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
