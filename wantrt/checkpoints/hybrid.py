"""A hybrid: experts of several checkpoints that take turns along one schedule, as one checkpoint.

They denoise the same latents under the same conditions, so the loop needs to know nothing of it:
a hybrid is a variant whose experts come from different files. All besides the experts (encoders,
tokenizer, VAE, recorded settings, and the defaults of the variant) is the first checkpoint's.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from wantrt.checkpoints.checkpoint import Checkpoint, Part, part_configs
from wantrt.checkpoints.configs import differences
from wantrt.config import Expert
from wantrt.errors import CheckpointError, SettingsError
from wantrt.experts import CUSTOM, ExpertRange, write_experts

CONDITIONS = (  # what the inputs of two experts must have in common
    *("in_channels", "out_channels", "patch_size", "text_dim", "text_len"),
    *("image_dim", "image_positions", "vace_channels"),
)


def join(ranges: Sequence[ExpertRange], opened: Sequence[Checkpoint]) -> Checkpoint:
    """One checkpoint of all; `opened` holds that of each expert.

    Raises SettingsError for an expert that its checkpoint has not, CheckpointError for experts that
    do not fit together.
    """
    first = opened[0]
    names = _name_all(ranges)
    experts, parts = [], {}
    for one, name, checkpoint in zip(ranges, names, opened, strict=True):
        expert = _choose(one, checkpoint)
        experts.append(replace(expert, name=name))
        parts[name] = replace(checkpoint.parts[expert.name], name=name)
        _check_fit((names[0], first, experts[0]), (name, checkpoint, expert))
    variant = replace(
        first.variant,
        name="hybrid",
        title=", then ".join(
            f"{name} to sigma {one.end:g}" if one.end else name
            for name, one in zip(names, ranges, strict=True)
        ),
        aliases=(),
        repo_id=None,
        diffusers_repo_id=None,
        experts=tuple(experts),
        boundary_ratios=tuple(one.end for one in ranges[:-1]),
    )
    all_parts: dict[str, Part] = {**first.parts, **parts}
    layouts = dict.fromkeys(checkpoint.layout or "generated" for checkpoint in opened)
    return Checkpoint(
        variant=variant,
        layout=", ".join(layouts),
        parts={name: all_parts[name] for name in part_configs(variant)},
        source=write_experts(ranges),
        settings=first.settings,
        tokenizer=first.tokenizer,
        notes=tuple(_notes(opened)),
    )


def _name_all(ranges: Sequence[ExpertRange]) -> list[str]:
    """The names of the parts: NAME in full; the second of a name is NAME-2."""
    names, seen = [], Counter[str]()
    for one in ranges:
        variant, expert = one.split_name()
        name = ".".join(filter(None, (variant or CUSTOM, expert)))
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _choose(one: ExpertRange, checkpoint: Checkpoint) -> Expert:
    variant, name = one.split_name()
    experts = {expert.name: expert for expert in checkpoint.variant.experts}
    if name is None and len(experts) == 1:
        return checkpoint.variant.experts[0]
    if name not in experts:
        say = f"{variant or CUSTOM}." + f" or {variant or CUSTOM}.".join(experts)
        has = f"no expert {name}" if name else f"{len(experts)} experts"
        raise SettingsError(f"{checkpoint.source} has {has}; say {say}")
    return experts[name]


def _check_fit(
    ours: tuple[str, Checkpoint, Expert], theirs: tuple[str, Checkpoint, Expert]
) -> None:
    """Raises CheckpointError unless two experts can take turns on one latent."""
    (name, first, expert), (other_name, other, other_expert) = ours, theirs
    one, another = first.variant, other.variant

    def refuse(what: str, differing: Sequence[str]) -> None:
        if differing:
            short = [f"other {d.split()[0]}" if "(" in d else d for d in differing]  # statistics
            raise CheckpointError(
                f"{name} and {other_name} are experts {what}: {other_name} has "
                f"{'; '.join(short)}. They cannot take turns; choose experts of one family."
            )

    refuse("of different latent spaces", differences(one.vae, another.vae))
    if one.task != another.task:
        refuse("of different tasks", [f"{another.task}, not {one.task}"])
    refuse(
        "under different conditions",
        [
            line
            for line in differences(expert.dit, other_expert.dit)
            if line.split()[0] in CONDITIONS
        ],
    )
    refuse("behind different text encoders", differences(one.text_encoder, another.text_encoder))
    if one.image_encoder != another.image_encoder:
        refuse(
            "behind different image encoders", differences(one.image_encoder, another.image_encoder)
        )


def _notes(opened: Sequence[Checkpoint]) -> list[str]:
    first = opened[0]
    others = [checkpoint for checkpoint in opened if checkpoint.source != first.source]
    notes = []
    if others:
        notes.append(f"text encoder, tokenizer and VAE of the hybrid are those of {first.source}")
    notes += [
        f"the VAE of {checkpoint.source} has other weights than that of {first.source}, which "
        "decodes: if their latents differ, so will colours and shapes"
        for checkpoint in others
        if checkpoint.parts["vae"].fingerprint != first.parts["vae"].fingerprint
    ]
    return list(dict.fromkeys(notes))
