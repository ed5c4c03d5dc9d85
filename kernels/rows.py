"""What the kernels share: one program holds one row of channels in registers.

All offsets are 64-bit: the last of 75,600 tokens of 13,824 channels lies past 2**31 bytes.

A sum over a row is a barrier that no load is moved across. What comes from memory is loaded before
it, so that its latency is paid once; what all tokens share, and a cache holds, after it, so that it
takes no registers meanwhile.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

# stated, because the default differs between versions of Triton; fused rounds once, not twice
LAUNCH = {"enable_fp_fusion": True}


def warps(elements: int) -> int:
    """How many warps hold a block of `elements`: 32 a thread, more only above 16384.

    Fewer threads spend fewer registers on anything but elements: by ptxas for SM90, up to twice as
    many rows of 5120 fit onto a processor as with 16 a thread, and no register is spilled.
    """
    return min(max(elements // 1024, 1), 16)


@triton.jit
def row_start(stride):
    """Where this program's row begins, in elements. stride: from row to row."""
    return tl.program_id(0).to(tl.int64) * stride


@triton.jit
def load_once(ptr, start, channel, inside):
    """A part of a row that nothing reads again, in float32; it need not stay in a cache."""
    x = tl.load(ptr + start + channel, mask=inside, other=0.0, eviction_policy="evict_first")
    return x.to(tl.float32)


@triton.jit
def load_shared(ptr, start, channel, inside):
    """A part of a row that all tokens read (weights, modulation), in float32."""
    x = tl.load(ptr + start + channel, mask=inside, other=0.0, eviction_policy="evict_last")
    return x.to(tl.float32)


@triton.jit
def modulation_start(token_row_ptr, seq_len, batch_stride, row_stride):
    """Where the modulation of this program's token begins. token_row_ptr None: all take row 0."""
    program = tl.program_id(0)  # b * L + l
    start = (program // seq_len).to(tl.int64) * batch_stride
    if token_row_ptr is not None:
        start += tl.load(token_row_ptr + program % seq_len).to(tl.int64) * row_stride
    return start


@triton.jit
def layer_norm(x, inside, EPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Normalise a row. x: float32, zero outside. Two passes, for E[x²] − E[x]² cancels."""
    mean = tl.sum(x, axis=0) / CHANNELS
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / CHANNELS
    return centred * (1.0 / tl.sqrt(variance + EPS))


@triton.jit
def rms_norm_row(x, EPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Normalise a row, not yet weighted. x: float32, zero outside."""
    return x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / CHANNELS + EPS))


@triton.jit
def rotate_pairs(x, cos, sin, BLOCK: tl.constexpr):
    """Rotate the pairs (2i, 2i+1). x: [BLOCK]; cos, sin: [BLOCK/2], one a pair."""
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(rotated, (BLOCK,))


@triton.jit
def load_angles(table_ptr, token, CHANNELS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The cosines (or sines) of a token for each pair of all its heads: [BLOCK/2].

    table: [L, HALF], one row for every head. Long videos have tables of the size of a cache, so
    nothing asks to keep them there.
    """
    pair = tl.arange(0, BLOCK // 2)
    at = table_ptr + token.to(tl.int64) * HALF + pair % HALF
    return tl.load(at, mask=pair < CHANNELS // 2, other=0.0)
