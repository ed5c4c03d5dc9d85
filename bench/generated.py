"""Checkpoints with generated weights, whole where they are measured and small elsewhere."""

from collections.abc import Collection

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

# Widths that another part reads stay: a text encoder's `dim` is the width of the text features.
SMALL = {
    "dit": {"dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 1},
    "text_encoder": {
        "vocab_size": 128,
        "attention_dim": 64,
        "ffn_dim": 64,
        "num_heads": 1,
        "num_layers": 1,
    },
    "vae": {"encoder_dim": 8, "decoder_dim": 8, "num_res_blocks": 1},
}


def generated(seed: int, whole: Collection[str], **changes: int) -> str:
    """A source that `open_checkpoint` takes: ``random:0:num_layers=2,vae.encoder_dim=8,…``.

    whole: of "dit", "text_encoder", "vae". changes: fields of what is whole, `num_layers` of a
    text encoder being "text_encoder__num_layers".
    """
    fields = [
        f"{'' if part == 'dit' else part + '.'}{name}={value}"
        for part, values in SMALL.items()
        if part not in whole
        for name, value in values.items()
    ]
    fields += [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return f"random:{seed}:{','.join(fields)}"
