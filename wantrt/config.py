"""The table of variants: every released Wan 2.1 / 2.2 checkpoint, and `nano`, as plain data.

What differs between checkpoints is a field here, never a branch elsewhere. A new variant is one
entry in `VARIANTS`; ``wantrt info`` and the parity tests pick it up by themselves.

Sources: the official Wan-Video/Wan2.1 and Wan-Video/Wan2.2 repositories (``wan/configs``, the rules
of the command line) and the published ``config.json`` files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from wantrt.errors import SettingsError, UnsupportedTaskError
from wantrt.names import check_name

Size = tuple[int, int]  # (width, height) in pixels, written 832x480


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of one Wan transformer."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16  # noisy latent, and for I2V the mask (4) and condition latent (16)
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512  # rows of text that cross-attention always sees, zero-padded
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (frames, height, width) in latent cells
    eps: float = 1e-6
    image_dim: int | None = None  # width of CLIP features: image cross-attention beside the text's
    image_positions: int | None = None  # learned positions over the image rows (FLF2V: 514)
    vace_layers: tuple[int, ...] = ()  # main blocks that receive a hint
    vace_channels: int | None = None
    audio_layers: tuple[int, ...] = ()  # main blocks followed by an audio injector (S2V)
    face_layers: tuple[int, ...] = ()  # main blocks followed by a face adapter (Animate)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of a causal 3-D VAE and the statistics of its latent."""

    z_dim: int
    encoder_dim: int
    decoder_dim: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    dim_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1  # pixels folded into channels before the encoder (2.2: 2)
    residual: bool = False  # parameter-free shortcuts around each stage (2.2)

    @property
    def temporal_stride(self) -> int:
        return int(2 ** sum(self.temporal_downsample))

    @property
    def spatial_stride(self) -> int:
        return int(2 ** len(self.temporal_downsample)) * self.patch_size


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Shape of a UMT5 encoder: T5 v1.1 with a position-bias table in every layer."""

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.attention_dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Shape of the CLIP ViT-H/14 tower; only the first `num_layers` of its 32 blocks run."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    num_heads: int = 16
    ffn_dim: int = 5120
    num_layers: int = 31
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One DiT and the guidance it runs with.

    `folder` is where its files lie: "" is the root of an official repository.
    """

    name: str
    dit: DiTConfig
    guidance_scale: float
    folder: str = ""
    diffusers_folder: str = "transformer"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A released checkpoint and everything that distinguishes it.

    `experts` run in the order given. `boundary_ratios` are the sigmas between them: the next expert
    takes over below.
    """

    name: str
    title: str
    task: str
    experts: tuple[Expert, ...]
    vae: VAEConfig
    sizes: tuple[Size, ...]  # the first is the default
    num_inference_steps: int
    flow_shift: float
    num_frames: int
    fps: int
    aliases: tuple[str, ...] = ()
    repo_id: str | None = None
    diffusers_repo_id: str | None = None
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    image_encoder: ImageEncoderConfig | None = None
    audio_encoder: str | None = None
    boundary_ratios: tuple[float, ...] = ()  # one less than experts, falling
    solver: str = "unipc"
    negative_prompt: str = ""
    flow_shift_by_size: tuple[tuple[Size, float], ...] = ()
    vae_file: str = "Wan2.1_VAE.pth"

    @property
    def size(self) -> Size:
        return self.sizes[0]

    @property
    def size_step(self) -> int:
        """Width and height are multiples of this many pixels (VAE stride times patch)."""
        return self.vae.spatial_stride * self.experts[0].dit.patch_size[1]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what has weights of its own, in the order in which they run."""
        encoders = ("text_encoder", *(("image_encoder",) if self.image_encoder else ()))
        return (*encoders, *(expert.name for expert in self.experts), "vae")

    @property
    def sigma_ranges(self) -> tuple[tuple[float, float], ...]:
        """The sigmas that each expert serves: from the first down to the second."""
        between = self.boundary_ratios
        return tuple(zip((1.0, *between), (*between, 0.0), strict=True))

    @property
    def modulation_rows(self) -> int:
        """Noise levels among the tokens of a video: TI2V's first frame may be clean."""
        return 2 if self.task == "ti2v" else 1

    @property
    def num_images(self) -> int:
        """Images that the image encoder sees, if there is one."""
        return 2 if self.task == "flf2v" else 1

    @property
    def image_rows(self) -> int | None:
        """Rows of image features that a transformer attends to."""
        if self.image_encoder is None:
            return None
        return self.image_encoder.num_tokens * self.num_images

    def flow_shift_for(self, size: Size) -> float:
        return dict(self.flow_shift_by_size).get(size, self.flow_shift)


# -- The two VAEs ---------------------------------------------------------------------------------

# fmt: off
VAE_2_1 = VAEConfig(
    z_dim=16,
    encoder_dim=96,
    decoder_dim=96,
    latents_mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    latents_std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)

VAE_2_2 = VAEConfig(
    z_dim=48,
    encoder_dim=160,
    decoder_dim=256,
    patch_size=2,
    residual=True,
    latents_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latents_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)
# fmt: on

# -- The transformers -----------------------------------------------------------------------------

DIT_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
DIT_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
DIT_14B_CONDITIONED = replace(DIT_14B, in_channels=36)  # noisy 16, mask 4, condition latent 16
DIT_14B_I2V = replace(DIT_14B_CONDITIONED, image_dim=1280)
DIT_5B = DiTConfig(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48
)

# -- nano: the checkpoint that ships with wantrt (wantrt/nano) -------------------------------------

DIT_NANO = DiTConfig(dim=128, ffn_dim=448, num_heads=4, num_layers=6, text_dim=96, text_len=32)
DIT_NANO_I2V = replace(DIT_NANO, in_channels=36)
TEXT_ENCODER_NANO = TextEncoderConfig(
    vocab_size=80, dim=96, attention_dim=96, ffn_dim=256, num_heads=4, num_layers=2
)
# fmt: off
VAE_NANO = VAEConfig(
    z_dim=16,
    encoder_dim=8,
    decoder_dim=8,
    dim_multipliers=(1, 2, 4, 8),
    num_res_blocks=1,
    latents_mean=(
        -0.0941, 0.1238, 0.0126, 0.3074, -0.0106, 0.0490, -0.3476, -0.0807,
        0.0293, 0.1903, 0.0423, -0.1061, 0.1773, 0.2305, -0.0430, 0.0466,
    ),
    latents_std=(
        0.8652, 0.8119, 1.5567, 0.7957, 1.0426, 0.9427, 1.4799, 0.9243,
        0.7096, 0.6569, 0.7811, 0.6227, 1.6251, 0.6869, 0.5429, 0.8009,
    ),
)
# fmt: on

# -- Prompts that ship with the checkpoints -------------------------------------------------------

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT_I2V = "镜头晃动，" + NEGATIVE_PROMPT
NEGATIVE_PROMPT_FLF2V = "镜头切换，" + NEGATIVE_PROMPT_I2V
NEGATIVE_PROMPT_S2V = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# -- The table ------------------------------------------------------------------------------------

SIZES_480P: tuple[Size, ...] = ((832, 480), (480, 832))
SIZES_720P: tuple[Size, ...] = ((1280, 720), (720, 1280))
SHIFT_3_AT_480P: tuple[tuple[Size, float], ...] = tuple((size, 3.0) for size in SIZES_480P)


def _dense(dit: DiTConfig, *, guidance_scale: float) -> tuple[Expert, ...]:
    return (Expert(name="transformer", dit=dit, guidance_scale=guidance_scale),)


def _high_and_low_noise(
    dit: DiTConfig, *, guidance_scales: tuple[float, float]
) -> tuple[Expert, ...]:
    """The two experts of an A14B model; `guidance_scales` in the same order, high noise first."""
    high, low = guidance_scales
    return (
        Expert(
            name="high_noise",
            dit=dit,
            guidance_scale=high,
            folder="high_noise_model",
            diffusers_folder="transformer",
        ),
        Expert(
            name="low_noise",
            dit=dit,
            guidance_scale=low,
            folder="low_noise_model",
            diffusers_folder="transformer_2",
        ),
    )


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="t2v-1.3b",
            aliases=("1.3b",),
            title="Wan2.1 T2V 1.3B",
            task="t2v",
            repo_id="Wan-AI/Wan2.1-T2V-1.3B",
            diffusers_repo_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            experts=_dense(DIT_1_3B, guidance_scale=5.0),
            vae=VAE_2_1,
            sizes=SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=50,
            flow_shift=5.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="t2v-14b",
            aliases=("14b",),
            title="Wan2.1 T2V 14B",
            task="t2v",
            repo_id="Wan-AI/Wan2.1-T2V-14B",
            diffusers_repo_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            experts=_dense(DIT_14B, guidance_scale=5.0),
            vae=VAE_2_1,
            sizes=SIZES_720P + SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=50,
            flow_shift=5.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="i2v-14b-480p",
            title="Wan2.1 I2V 14B 480P",
            task="i2v",
            repo_id="Wan-AI/Wan2.1-I2V-14B-480P",
            diffusers_repo_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            experts=_dense(DIT_14B_I2V, guidance_scale=5.0),
            vae=VAE_2_1,
            image_encoder=ImageEncoderConfig(),
            sizes=SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=40,
            flow_shift=5.0,
            flow_shift_by_size=SHIFT_3_AT_480P,
            negative_prompt=NEGATIVE_PROMPT_I2V,
        ),
        Variant(
            name="i2v-14b-720p",
            title="Wan2.1 I2V 14B 720P",
            task="i2v",
            repo_id="Wan-AI/Wan2.1-I2V-14B-720P",
            diffusers_repo_id="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            experts=_dense(DIT_14B_I2V, guidance_scale=5.0),
            vae=VAE_2_1,
            image_encoder=ImageEncoderConfig(),
            sizes=SIZES_720P + SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=40,
            flow_shift=5.0,
            flow_shift_by_size=SHIFT_3_AT_480P,
            negative_prompt=NEGATIVE_PROMPT_I2V,
        ),
        Variant(
            name="flf2v-14b",
            title="Wan2.1 FLF2V 14B 720P",
            task="flf2v",
            repo_id="Wan-AI/Wan2.1-FLF2V-14B-720P",
            diffusers_repo_id="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            experts=_dense(replace(DIT_14B_I2V, image_positions=514), guidance_scale=5.0),
            vae=VAE_2_1,
            image_encoder=ImageEncoderConfig(),
            sizes=SIZES_720P + SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=50,
            flow_shift=16.0,
            negative_prompt=NEGATIVE_PROMPT_FLF2V,
        ),
        Variant(
            name="vace-1.3b",
            title="Wan2.1 VACE 1.3B",
            task="vace",
            repo_id="Wan-AI/Wan2.1-VACE-1.3B",
            diffusers_repo_id="Wan-AI/Wan2.1-VACE-1.3B-diffusers",
            experts=_dense(
                replace(DIT_1_3B, vace_layers=tuple(range(0, 30, 2)), vace_channels=96),
                guidance_scale=5.0,
            ),
            vae=VAE_2_1,
            sizes=SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=50,
            flow_shift=16.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="vace-14b",
            title="Wan2.1 VACE 14B",
            task="vace",
            repo_id="Wan-AI/Wan2.1-VACE-14B",
            diffusers_repo_id="Wan-AI/Wan2.1-VACE-14B-diffusers",
            experts=_dense(
                replace(DIT_14B, vace_layers=tuple(range(0, 40, 5)), vace_channels=96),
                guidance_scale=5.0,
            ),
            vae=VAE_2_1,
            sizes=SIZES_720P + SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=50,
            flow_shift=16.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="t2v-a14b",
            title="Wan2.2 T2V A14B",
            task="t2v",
            repo_id="Wan-AI/Wan2.2-T2V-A14B",
            diffusers_repo_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            experts=_high_and_low_noise(DIT_14B, guidance_scales=(4.0, 3.0)),
            boundary_ratios=(0.875,),
            vae=VAE_2_1,
            sizes=SIZES_720P + SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=40,
            flow_shift=12.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="i2v-a14b",
            title="Wan2.2 I2V A14B",
            task="i2v",
            repo_id="Wan-AI/Wan2.2-I2V-A14B",
            diffusers_repo_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            experts=_high_and_low_noise(DIT_14B_CONDITIONED, guidance_scales=(3.5, 3.5)),
            boundary_ratios=(0.9,),
            vae=VAE_2_1,
            sizes=SIZES_720P + SIZES_480P,
            num_frames=81,
            fps=16,
            num_inference_steps=40,
            flow_shift=5.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="ti2v-5b",
            aliases=("5b",),
            title="Wan2.2 TI2V 5B",
            task="ti2v",
            repo_id="Wan-AI/Wan2.2-TI2V-5B",
            diffusers_repo_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            experts=_dense(DIT_5B, guidance_scale=5.0),
            vae=VAE_2_2,
            vae_file="Wan2.2_VAE.pth",
            sizes=((1280, 704), (704, 1280)),
            num_frames=121,
            fps=24,
            num_inference_steps=50,
            flow_shift=5.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="s2v-14b",
            title="Wan2.2 S2V 14B",
            task="s2v",
            repo_id="Wan-AI/Wan2.2-S2V-14B",
            experts=_dense(
                replace(DIT_14B, audio_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)),
                guidance_scale=4.5,
            ),
            vae=VAE_2_1,
            audio_encoder="wav2vec2-large-xlsr-53-english",
            sizes=((1024, 704), (704, 1024), *SIZES_720P, *SIZES_480P),
            num_frames=80,  # a clip; clips are chained for as long as the audio lasts
            fps=16,
            num_inference_steps=40,
            flow_shift=3.0,
            negative_prompt=NEGATIVE_PROMPT_S2V,
        ),
        Variant(
            name="animate-14b",
            title="Wan2.2 Animate 14B",
            task="animate",
            repo_id="Wan-AI/Wan2.2-Animate-14B",
            diffusers_repo_id="Wan-AI/Wan2.2-Animate-14B-Diffusers",
            experts=_dense(
                replace(DIT_14B_I2V, face_layers=tuple(range(0, 40, 5))), guidance_scale=1.0
            ),
            vae=VAE_2_1,
            image_encoder=ImageEncoderConfig(),
            sizes=SIZES_720P,
            num_frames=77,
            fps=30,
            num_inference_steps=20,
            flow_shift=5.0,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        Variant(
            name="nano",
            title="wantrt nano",
            task="t2v",
            experts=_dense(DIT_NANO, guidance_scale=3.5),
            vae=VAE_NANO,
            text_encoder=TEXT_ENCODER_NANO,
            sizes=((64, 64),),
            num_frames=25,
            fps=16,
            num_inference_steps=20,
            flow_shift=5.0,
        ),
        Variant(
            name="nano-i2v",
            title="wantrt nano I2V",
            task="i2v",
            experts=_dense(DIT_NANO_I2V, guidance_scale=2.0),
            vae=VAE_NANO,
            text_encoder=TEXT_ENCODER_NANO,
            sizes=((64, 64),),
            num_frames=25,
            fps=16,
            num_inference_steps=20,
            flow_shift=5.0,
        ),
    )
}


# Variant -> its checkpoint, for those that ship with wantrt.
SHIPPED: Mapping[str, Path] = {
    "nano": Path(__file__).parent / "nano" / "checkpoint",
    "nano-i2v": Path(__file__).parent / "nano" / "checkpoint_i2v",
}

# That work today; what each takes, and does before the loop, is in wantrt/tasks.
TASKS = ("t2v", "i2v", "flf2v", "ti2v", "vace")


def find_variant(name: str) -> Variant:
    """The row of a name or alias, in any case. Raises SettingsError with the nearest known name."""
    known = {alias: row for row in VARIANTS.values() for alias in (row.name, *row.aliases)}
    if name.lower() == "custom":
        raise SettingsError(
            "custom is what a checkpoint becomes whose dimensions are those of no variant. "
            "Leave the variant out and name the checkpoint: wantrt build --checkpoint FOLDER"
        )
    check_name("variant", name.lower(), known)
    return known[name.lower()]


def require_task(task: str, name: str) -> None:
    """Raise UnsupportedTaskError, in one line, for a task that is not there yet."""
    if task not in TASKS:
        ready = ", ".join(row.name for row in VARIANTS.values() if row.task in TASKS)
        raise UnsupportedTaskError(f"{name}: task {task} is not there yet; today: {ready}")


GUIDANCE_BATCH_TOKENS = 32_760  # up to 480p x 81 frames both guidance passes run as a batch of 2
