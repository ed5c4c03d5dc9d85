"""How much memory a generation takes on the device, before anything is loaded.

Weights, caches and buffers follow from the shapes of the components; scratch, what a component
computes in, is counted by running it without memory (wantrt/runtime/scratch.py). Components never
run at once, so the largest scratch serves all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from wantrt.config import Size, Variant
from wantrt.device import Device
from wantrt.errors import SettingsError
from wantrt.models.components import Component, part_components
from wantrt.models.ops import Ops
from wantrt.pieces import available_memory
from wantrt.runtime.parts import STREAMED
from wantrt.runtime.residency import POLICIES
from wantrt.runtime.scratch import KERNELS, scratch_bytes
from wantrt.runtime.sizes import dit_symbols, vae_symbols
from wantrt.runtime.slots import slot_sizes
from wantrt.session import PRECISIONS, TensorSpec
from wantrt.tasks.source import TAKES

FLOAT_BYTES = 4
LARGEST_SCRATCH = 20  # of any phase, in what its caches and buffers take: far more than there is
GIB = 2**30

Symbols = Mapping[str, int]


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
class PhaseMemory:
    """What one phase takes: the text or image encoder, the VAE's encoder, one expert, the decoder.

    shared_bytes: under `phase`, instead of weights_bytes, the slots in which experts take turns.
    streamed_bytes: under `stream`, where stacks share two slots. held_bytes: what other phases have
    left or are still to get: text embeddings, noise, conditions. stays: a resident pipeline keeps
    its caches and buffers for the next generation. runs: the components that run in it, each with
    the sizes at which it does.
    """

    part: str
    weights_bytes: int
    shared_bytes: int
    streamed_bytes: int
    caches_bytes: int
    buffers_bytes: int
    held_bytes: int
    stays: bool
    runs: Sequence[tuple[Component, Symbols]] = field(repr=False, compare=False)

    @cached_property
    def scratch_bytes(self) -> int:
        """Counted when it is asked for first: that takes a moment, and imports much of torch."""
        return max((scratch_bytes(*run) for run in self.runs), default=0)

    def memory(self, *, streamed: bool = False) -> Memory:
        """Of the phase alone."""
        return Memory(
            weights_bytes=self.streamed_bytes if streamed else self.shared_bytes,
            scratch_bytes=self.scratch_bytes,
            caches_bytes=self.caches_bytes,
            buffers_bytes=self.buffers_bytes + self.held_bytes,
        )


def phases(
    variant: Variant,
    precision: Mapping[str, str],
    size: Size,
    num_frames: int,
    stacks: Mapping[str, int | None] | None = None,
    ops: Ops = KERNELS,
) -> list[PhaseMemory]:
    """What each phase of a guided generation takes, in their order.

    precision: part -> fp32, bf16 or fp16. stacks: part -> layers a run, for those that have been
    cut otherwise than by default. ops: `KERNELS` for a GPU, `REFERENCE` for plain torch's.
    """
    found, experts = [], {}
    for part in _phase_names(variant):
        owner = "vae" if part == "vae_encoder" else part
        prefix = {"vae": "vae_decoder", "vae_encoder": "vae_encoder"}.get(part, "")
        made = part_components(
            variant, owner, PRECISIONS[precision[owner]], (stacks or {}).get(owner), ops
        )
        components = {c.name: c for c in made if c.name.startswith(prefix)}
        symbols = _symbols(variant, part, size, num_frames)
        whole, streamed = _weights_bytes(components.values())
        caches = buffers = 0
        of_one_frame = num_frames == 1 or (part == "vae_encoder" and variant.task == "ti2v")
        if part == "text_encoder":
            buffers = _text_bytes(components, symbols)
        elif part == "image_encoder":
            buffers = _image_bytes(variant, components, symbols)
        elif part == "vae":
            caches, buffers = _decoder_bytes(components, symbols)
        elif part == "vae_encoder":
            frames = 1 if of_one_frame else _latent_frames(variant, num_frames)
            caches, buffers = _encoder_bytes(components, symbols, frames)
        else:
            buffers = _dit_bytes(variant, components, symbols)
            experts[part] = made
        found.append(
            PhaseMemory(
                part=part,
                weights_bytes=whole,
                shared_bytes=whole,
                streamed_bytes=streamed,
                caches_bytes=caches,
                buffers_bytes=buffers,
                held_bytes=_held_bytes(variant, part, size, num_frames),
                stays=part not in ("text_encoder", "image_encoder", "vae_encoder"),
                runs=[
                    (component, symbols)
                    for name, component in components.items()
                    if not (of_one_frame and name.endswith("_next"))
                ],
            )
        )
    if len(experts) == 1:
        return found
    shared = sum(slot_sizes(experts.values()).values())
    return [replace(p, shared_bytes=shared) if p.part in experts else p for p in found]


def _phase_names(variant: Variant) -> list[str]:
    """In the order in which they run; what starts from pixels encodes them before the loop."""
    names = list(variant.parts)
    if any(TAKES.get(variant.task, ())):
        names.insert(names.index(variant.experts[0].name), "vae_encoder")
    return names


def _symbols(variant: Variant, part: str, size: Size, num_frames: int) -> Symbols:
    """The sizes at which the components of a phase run; of prompts the longest, one by one."""
    if part == "text_encoder":
        return {"B": 1, "S": variant.experts[0].dit.text_len}
    if part == "image_encoder":
        return {"B": 1}
    if part in ("vae", "vae_encoder"):
        return vae_symbols(variant, size)
    return {
        **dit_symbols(variant, size, num_frames, guided=True),
        "T": variant.num_inference_steps,
    }


def predict(of_phases: Sequence[PhaseMemory], residency: str) -> Memory:
    """The most that a policy takes at any moment, but for what an allocator keeps beside it."""
    if residency != "resident":
        alone = [phase.memory(streamed=residency == "stream") for phase in of_phases]
        return max(alone, key=lambda memory: memory.total_bytes)
    staying = [phase for phase in of_phases if phase.stays]
    moments = []
    for phase in of_phases:
        there = staying if phase.stays else [*staying, phase]
        moments.append(
            Memory(
                weights_bytes=sum(each.weights_bytes for each in of_phases),
                scratch_bytes=phase.scratch_bytes,
                caches_bytes=sum(each.caches_bytes for each in there),
                buffers_bytes=sum(each.buffers_bytes for each in there) + phase.held_bytes,
            )
        )
    return max(moments, key=lambda memory: memory.total_bytes)


def weights_alone(phase: PhaseMemory) -> PhaseMemory:
    return replace(phase, caches_bytes=0, buffers_bytes=0, held_bytes=0, runs=())


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
    if _at_most(of_phases, on_cpu) <= free or need(residency) <= free:
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


def _at_most(of_phases: Sequence[PhaseMemory], on_cpu: bool) -> int:
    """More than any policy takes, told without counting scratch: a small model starts at once."""
    return sum(
        (0 if on_cpu else phase.weights_bytes)
        + (1 + LARGEST_SCRATCH) * (phase.caches_bytes + phase.buffers_bytes + phase.held_bytes)
        for phase in of_phases
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


def _text_bytes(components: Mapping[str, Component], symbols: Symbols) -> int:
    """What the stacks are given, for a prompt and a negative one: both pass each stack in turn."""
    return 2 * _nbytes_of(components["text_stack"].inputs, symbols)


def _image_bytes(variant: Variant, components: Mapping[str, Component], symbols: Symbols) -> int:
    """An image at a time; the features of those before it."""
    encoder = components["image_encoder"]
    features = _nbytes_of(encoder.outputs, symbols)
    return _nbytes_of(encoder.inputs, symbols) + (variant.num_images - 1) * features


def _decoder_bytes(components: Mapping[str, Component], symbols: Symbols) -> tuple[int, int]:
    """Both banks of caches; a latent frame, and the pixels of a first chunk and of a next one."""
    first, following = components["vae_decoder_first"], components["vae_decoder_next"]
    latent = _nbytes(first.inputs["latent"], symbols)
    pixels = [_nbytes(each.outputs["pixels"], symbols) for each in (first, following)]
    return _banks_bytes(following, symbols), latent + sum(pixels)


def _encoder_bytes(
    components: Mapping[str, Component], symbols: Symbols, latent_frames: int
) -> tuple[int, int]:
    """Both banks of caches; the pixels of a chunk, and all latent frames, singly and joined."""
    following = components["vae_encoder_next"]
    chunk = components["vae_encoder_first"] if latent_frames == 1 else following
    pixels = _nbytes(chunk.inputs["pixels"], symbols)
    latent = _nbytes(chunk.outputs["latent"], symbols)
    return _banks_bytes(following, symbols), pixels + 2 * latent_frames * latent


def _banks_bytes(following: Component, symbols: Symbols) -> int:
    caches = {name: spec for name, spec in following.inputs.items() if name.startswith("cache_")}
    return 2 * _nbytes_of(caches, symbols)


def _dit_bytes(variant: Variant, components: Mapping[str, Component], symbols: Symbols) -> int:
    """The buffers of a guided step."""
    stack, head, patch, time = (
        components[name] for name in ("dit_stack", "dit_head", "dit_patch", "dit_time")
    )
    runs = 2 // symbols["B"]  # of each stack a step

    def given(*names: str) -> int:
        return sum(_nbytes(stack.inputs[name], symbols) for name in names if name in stack.inputs)

    hidden = _nbytes(stack.inputs["hidden"], symbols)
    velocity = _nbytes(head.outputs["velocity"], symbols)
    latent, sample = _nbytes(patch.inputs["latent"], symbols), velocity // symbols["B"]
    of_a_run = hidden + velocity + given("context", "image_context")
    of_a_step = (
        hidden  # where a stack writes, in turn with what it reads
        + latent
        + 3 * sample  # and the solver's history
        + given("cos", "sin", "e6", "token_row", "hint")
        + _nbytes(head.inputs["e"], symbols)
        + _nbytes_of(time.outputs, symbols)
    )
    of_a_step += _nbytes_of(components["dit_condition"].inputs, {**symbols, "B": 2})
    if "hint" in stack.inputs:  # VACE: a second chain, and what it starts from
        of_a_run += hidden
        of_a_step += _nbytes(components["dit_vace_start"].inputs["vace_context"], symbols)
    return runs * of_a_run + of_a_step


def _held_bytes(variant: Variant, part: str, size: Size, num_frames: int) -> int:
    """Of a guided generation: text embeddings, as they are remembered and joined; noise; what is
    known of the video, and of its images."""
    if part == "text_encoder":
        return 0
    dit = variant.experts[0].dit
    embeds = 2 * 2 * dit.text_len * dit.text_dim
    cells = _latent_frames(variant, num_frames) * prod(vae_symbols(variant, size).values())
    latent = (dit.in_channels + (dit.vace_channels or 0)) * cells
    features = 0
    if part != "image_encoder":
        features = (variant.image_rows or 0) * (dit.image_dim or 0)
    return (embeds + latent + features) * FLOAT_BYTES


def _latent_frames(variant: Variant, num_frames: int) -> int:
    return (num_frames - 1) // variant.vae.temporal_stride + 1


def _nbytes_of(specs: Mapping[str, TensorSpec], symbols: Symbols) -> int:
    return sum(_nbytes(spec, symbols) for spec in specs.values())


def _nbytes(spec: TensorSpec, symbols: Symbols) -> int:
    return prod(spec.concrete(symbols)) * spec.dtype.itemsize
