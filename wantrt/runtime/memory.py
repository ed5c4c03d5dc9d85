"""How much memory a generation takes on the device, from formulas, before anything is loaded.

Weights, caches and buffers are exact. Scratch, what a component computes in, is an estimate: the
widest moment of a block in the component's precision, in one arena for all, as they never run at
once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from wantrt.config import Size, Variant
from wantrt.device import Device
from wantrt.errors import SettingsError
from wantrt.models.components import Component, part_components
from wantrt.pieces import available_memory
from wantrt.runtime.parts import STREAMED
from wantrt.runtime.residency import POLICIES
from wantrt.runtime.sizes import dit_symbols, vae_symbols
from wantrt.session import PRECISIONS, TensorSpec
from wantrt.tasks.source import TAKES

FEATURE_MAPS = 4  # at full resolution, that a chunk of the VAE holds at its widest
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device.

    caches: the VAE's two banks. buffers: what goes in and out of components and stays in place.
    """

    weights_bytes: int
    scratch_bytes: int
    caches_bytes: int
    buffers_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.scratch_bytes + self.caches_bytes + self.buffers_bytes


@dataclass(frozen=True, kw_only=True)
class PhaseMemory(Memory):
    """What one phase takes: the text or image encoder, the VAE's encoder, one expert, the decoder.

    streamed_bytes: the weights of its stacks under `stream`, instead of weights_bytes.
    """

    part: str
    streamed_bytes: int


def phases(
    variant: Variant,
    precision: Mapping[str, str],
    size: Size,
    num_frames: int,
    stacks: Mapping[str, int | None] | None = None,
) -> list[PhaseMemory]:
    """What each phase of a guided generation takes, in their order.

    precision: part -> fp32, bf16 or fp16. stacks: part -> layers a run, for those that have been
    cut otherwise than by default.
    """
    found = []
    for part in _phase_names(variant):
        owner = part.removesuffix("_encoder") if part == "vae_encoder" else part
        dtype = PRECISIONS[precision[owner]]
        prefix = {"vae": "vae_decoder", "vae_encoder": "vae_encoder"}.get(part, "")
        components = {
            c.name: c
            for c in part_components(variant, owner, dtype, (stacks or {}).get(owner))
            if c.name.startswith(prefix)
        }
        whole, streamed = _weights_bytes(components.values())
        caches = 0
        if part == "text_encoder":
            scratch, buffers = _text_bytes(variant, dtype.itemsize)
        elif part == "image_encoder":
            scratch, buffers = _image_bytes(variant, components[part], dtype.itemsize)
        elif part == "vae":
            scratch, caches, buffers = _vae_bytes(
                variant, components["vae_decoder_next"], size, dtype.itemsize
            )
        elif part == "vae_encoder":  # float32 in every bundle
            scratch, caches, buffers = _vae_bytes(variant, components["vae_encoder_next"], size, 4)
        else:
            scratch, buffers = _dit_bytes(variant, components, size, num_frames, dtype.itemsize)
        found.append(
            PhaseMemory(
                part=part,
                weights_bytes=whole,
                streamed_bytes=streamed,
                scratch_bytes=scratch,
                caches_bytes=caches,
                buffers_bytes=buffers,
            )
        )
    return found


def _phase_names(variant: Variant) -> list[str]:
    """In the order in which they run; what starts from pixels encodes them before the loop."""
    names = list(variant.parts)
    if any(TAKES.get(variant.task, ())):
        names.insert(names.index(variant.experts[0].name), "vae_encoder")
    return names


def predict(of_phases: Sequence[PhaseMemory], residency: str) -> Memory:
    """The most that a policy takes at any moment."""
    if residency == "resident":
        return Memory(
            weights_bytes=sum(phase.weights_bytes for phase in of_phases),
            scratch_bytes=max(phase.scratch_bytes for phase in of_phases),
            caches_bytes=sum(phase.caches_bytes for phase in of_phases),
            buffers_bytes=sum(phase.buffers_bytes for phase in of_phases),
        )
    alone = [
        Memory(
            weights_bytes=phase.weights_bytes if residency == "phase" else phase.streamed_bytes,
            scratch_bytes=phase.scratch_bytes,
            caches_bytes=phase.caches_bytes,
            buffers_bytes=phase.buffers_bytes,
        )
        for phase in of_phases
    ]
    return max(alone, key=lambda memory: memory.total_bytes)


def weights_alone(phase: PhaseMemory) -> PhaseMemory:
    return replace(phase, scratch_bytes=0, caches_bytes=0, buffers_bytes=0)


def check_memory(
    of_phases: Sequence[PhaseMemory],
    residency: str,
    device: Device,
    loaded_bytes: int = 0,
    what: str = "",
) -> None:
    """Raises SettingsError with the numbers and the policy that would fit, if none is left to try.

    loaded_bytes: what of the prediction lies on the device already. On a CPU weights stay in their
    mapped files, and only the rest counts. what: for the message, "832x480 with 81 frames".
    """
    on_cpu = device.torch_device.type == "cpu"

    def need(policy: str) -> int:
        memory = predict(of_phases, policy)
        return memory.total_bytes - (memory.weights_bytes if on_cpu else 0)

    free = device.free_bytes() + loaded_bytes
    if need(residency) <= free:
        if residency == "stream":
            _check_host(of_phases)
        return
    memory = predict(of_phases, residency)
    fitting = [policy for policy in POLICIES if need(policy) <= free]
    remedy = (
        f"Take --residency {fitting[0]}: about {need(fitting[0]) / GIB:.1f} GiB."
        if fitting
        else "No other --residency fits either: take a smaller --size or fewer --frames."
    )
    weights = 0 if on_cpu else memory.weights_bytes
    raise SettingsError(
        f"not enough memory for {what} with --residency {residency}: about "
        f"{need(residency) / GIB:.1f} GiB (weights {weights / GIB:.1f}, scratch "
        f"{memory.scratch_bytes / GIB:.1f}, caches {memory.caches_bytes / GIB:.1f}, buffers "
        f"{memory.buffers_bytes / GIB:.1f}), and {free / GIB:.1f} GiB are free. {remedy}"
    )


def _check_host(of_phases: Sequence[PhaseMemory]) -> None:
    """Streamed weights wait in pinned memory, those of one phase at a time."""
    largest = max(of_phases, key=lambda phase: phase.weights_bytes)
    available = available_memory()
    if largest.weights_bytes > available:
        raise SettingsError(
            f"--residency stream keeps the weights of {largest.part} in host memory: "
            f"{largest.weights_bytes / GIB:.1f} GiB, and {available / GIB:.1f} GiB are available. "
            "Close other programs, or take --residency phase."
        )


# -- The formulas ---------------------------------------------------------------------------------


def _weights_bytes(components: Iterable[Component]) -> tuple[int, int]:
    """All weights, shared ones once; and the same where stacks share two slots."""
    sizes: dict[str, int] = {}
    saved = 0
    for component in components:
        nbytes = {name: _nbytes(spec, {}) for name, spec in component.weights.items()}
        for instance in component.instances:
            sizes |= {prepared: nbytes[name] for name, prepared in instance.items()}
        if component.name in STREAMED:
            saved += max(len(component.instances) - 2, 0) * sum(nbytes.values())
    whole = sum(sizes.values())
    return whole, whole - saved


def _text_bytes(variant: Variant, element: int) -> tuple[int, int]:
    """Scratch and buffers of the longest prompt, which runs alone; a negative one waits."""
    config, tokens = variant.text_encoder, variant.experts[0].dit.text_len
    scores = config.num_heads * tokens * tokens * 4
    wide = max(4 * config.attention_dim, 3 * config.ffn_dim)
    hidden = tokens * config.dim * 4
    return scores + tokens * wide * element + 2 * hidden, 4 * hidden


def _image_bytes(variant: Variant, component: Component, element: int) -> tuple[int, int]:
    """Scratch of an image, and buffers of all, which run one after the other."""
    config = variant.image_encoder
    assert config is not None
    tokens = config.num_tokens
    scores = config.num_heads * tokens * tokens * 4
    wide = max(4 * config.dim, 2 * config.ffn_dim)
    hidden = tokens * config.dim * 4
    specs = (*component.inputs.values(), *component.outputs.values())
    buffers = sum(_nbytes(spec, {"B": variant.num_images}) for spec in specs)
    return scores + tokens * wide * element + 2 * hidden, buffers


def _dit_bytes(
    variant: Variant,
    components: Mapping[str, Component],
    size: Size,
    num_frames: int,
    element: int,
) -> tuple[int, int]:
    """Scratch and buffers of a guided step.

    The widest moment of a block: beside the residual in float32, either q, k, v, their rotated
    copies and the output of attention, or the feed-forward before and after its activation.
    """
    stack, head, patch, time = (
        components[name] for name in ("dit_stack", "dit_head", "dit_patch", "dit_time")
    )
    symbols = {
        **dit_symbols(variant, size, num_frames, guided=True),
        "T": variant.num_inference_steps,
    }
    hidden = _nbytes(stack.inputs["hidden"], symbols)
    dim = stack.inputs["hidden"].shape[-1]
    ffn_dim = components["dit_stack"].weights["blocks.0.ffn.up.weight"].shape[0]
    assert isinstance(dim, int)
    assert isinstance(ffn_dim, int)
    wide = max(6 * dim, dim + 2 * ffn_dim)
    scratch = hidden + symbols["B"] * symbols["L"] * wide * element
    runs = 2 // symbols["B"]  # of each stack a step
    texts = [name for name in ("context", "image_context") if name in stack.inputs]
    chains = 0
    if "hint" in stack.inputs:  # VACE: a second chain, and what it starts from
        start = components["dit_vace_start"].inputs["vace_context"]
        chains = runs * hidden + _nbytes(stack.inputs["hint"], symbols) + _nbytes(start, symbols)
    velocity = _nbytes(head.outputs["velocity"], symbols)
    buffers = (
        (runs + 1) * hidden
        + runs * (sum(_nbytes(stack.inputs[name], symbols) for name in texts) + velocity)
        + chains
        + _nbytes(patch.inputs["latent"], symbols)
        + 3 * velocity // symbols["B"]  # the sample and the solver's history
        + sum(_nbytes(stack.inputs[name], symbols) for name in ("cos", "sin", "e6"))
        + sum(_nbytes(spec, symbols) for spec in time.outputs.values())
    )
    return scratch, buffers


def _vae_bytes(
    variant: Variant, component: Component, size: Size, element: int
) -> tuple[int, int, int]:
    """Scratch, caches and buffers of a chunk of the decoder or the encoder.

    The widest maps are those at full resolution, which in Wan 2.2 is that of 2x2 patches.
    """
    symbols = vae_symbols(variant, size)
    config = variant.vae
    caches = sum(
        _nbytes(spec, symbols) for name, spec in component.inputs.items() if "cache" in name
    )
    dim = config.decoder_dim if "decoder" in component.name else config.encoder_dim
    frames = config.temporal_stride + 2  # with the two of the cache
    cells = size[0] * size[1] // config.patch_size**2
    feature_map = frames * cells * dim * (2 if config.residual else 1) * element
    specs = {**component.inputs, **component.outputs}
    pixels = _nbytes(specs["pixels"], symbols)
    return FEATURE_MAPS * feature_map, 2 * caches, 2 * pixels


def _nbytes(spec: TensorSpec, symbols: Mapping[str, int]) -> int:
    return prod(spec.concrete(symbols)) * spec.dtype.itemsize
