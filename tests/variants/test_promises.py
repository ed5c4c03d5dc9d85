"""What a pipeline promises whatever it starts from: no mix-ups, no waste, a video that says how."""

import numpy as np
import pytest
from PIL import Image

from tests.engines.fake.device import FakeDevice
from tests.runtime.devices import on_device
from tests.tasks.pictures import film, moving_mask, picture
from tests.variants.small import bundle_of
from wantrt import Pipeline
from wantrt.errors import CancelledError
from wantrt.media import read_metadata
from wantrt.tasks.fitting import size_by_area

PROMPT = "a red circle moves right"
SHORT = {"num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 0}
FIRST, SECOND = picture(48, 32), picture(48, 32, seed=1)
FILM, MASK = film(5, 48, 32), moving_mask(5, 48, 32)

# variant -> settings that are all of one size, each with another source
SOURCES = {
    "i2v-14b-480p": [{"image": FIRST}, {"image": SECOND}],
    "flf2v-14b": [
        {"image": FIRST, "last_image": SECOND},
        {"image": SECOND, "last_image": FIRST},
    ],
    "i2v-a14b": [{"image": FIRST}, {"image": SECOND}],
    "ti2v-5b": [{"image": FIRST}, {"image": SECOND}, {}],
    "vace-1.3b": [
        {"video": FILM, "mask": MASK},
        {"reference_images": [FIRST]},
        {"video": FILM, "mask": 255 - MASK},
        {"video": FILM, "context_scale": 0.5},
        {},
    ],
}


def settings_of(variant, source):
    return {"size": (64, 32) if variant == "ti2v-5b" else (48, 32), **SHORT, **source}


@pytest.fixture(scope="module")
def frames_of():
    """The frames of a source by a pipeline that makes nothing else, remembered."""
    known = {}

    def make(variant, index):
        if (variant, index) not in known:
            with Pipeline.load(bundle_of(variant), "torch") as pipe:
                video = pipe(PROMPT, **settings_of(variant, SOURCES[variant][index]))
            known[variant, index] = video.frames
        return known[variant, index]

    return make


@pytest.fixture(scope="module", params=SOURCES)
def variant(request):
    return request.param


def test_sources_do_not_mix(variant, frames_of):
    """One after the other and back again, as each alone; and every source gives another video."""
    count = len(SOURCES[variant])
    with Pipeline.load(bundle_of(variant), "torch") as pipe:
        for index in (*range(count), *reversed(range(count))):
            video = pipe(PROMPT, **settings_of(variant, SOURCES[variant][index]))
            assert np.array_equal(video.frames, frames_of(variant, index)), SOURCES[variant][index]
    for one in range(count):
        for other in range(one):
            assert not np.array_equal(frames_of(variant, one), frames_of(variant, other))


@pytest.mark.parametrize(
    "policy", ["resident", "phase", pytest.param("stream", marks=pytest.mark.slow)]
)
def test_residency_does_not_show(variant, policy, frames_of):
    """On a device that captures steps, and tells when work and copies are not in order."""
    device = FakeDevice()
    with on_device(device, bundle_of(variant), residency=policy) as pipe:
        if policy != "resident":
            assert device.free_bytes() == device.total_bytes  # nothing loaded before it is needed
        for index in (0, 1):
            video = pipe(PROMPT, **settings_of(variant, SOURCES[variant][index]))
            assert np.array_equal(video.frames, frames_of(variant, index))
            if policy != "resident":
                assert not any(part._sessions for part in pipe.parts.values())
        assert policy == "stream" or device.replays > 0


def test_a_cancelled_generation_leaves_nothing(variant, frames_of):
    with Pipeline.load(bundle_of(variant), "torch") as pipe:
        settings = settings_of(variant, SOURCES[variant][1])
        with pytest.raises(CancelledError, match="denoise, after 2 of 4"):
            pipe(PROMPT, callback=lambda p: (p.stage, p.done) != ("denoise", 2), **settings)
        with pytest.raises(CancelledError):
            pipe(PROMPT, callback=lambda p: pipe.cancel(), **settings)
        video = pipe(PROMPT, **settings_of(variant, SOURCES[variant][0]))
        assert np.array_equal(video.frames, frames_of(variant, 0))


def test_a_file_names_what_it_was_made_of(tmp_path):
    image, reference = tmp_path / "first.png", tmp_path / "thing.png"
    Image.fromarray(FIRST).save(image)
    Image.fromarray(SECOND).save(reference)
    with Pipeline.load(bundle_of("i2v-a14b"), "torch") as pipe:
        video = pipe(PROMPT, **settings_of("i2v-a14b", {"image": image}))
        again = pipe(PROMPT, **settings_of("i2v-a14b", {"image": FIRST}))
    assert np.array_equal(video.frames, again.frames)
    assert again.metadata["source"] == {"image": "given"}
    video.save(tmp_path / "video.mp4")
    assert read_metadata(tmp_path / "video.mp4")["source"] == {"image": str(image)}
    with Pipeline.load(bundle_of("vace-1.3b"), "torch") as pipe:
        source = {"video": FILM, "reference_images": [str(reference), SECOND]}
        made = pipe.metadata(pipe.resolve(PROMPT, **settings_of("vace-1.3b", source)))
    assert made["source"] == {"video": "given", "reference_images": [str(reference), "given"]}


def test_the_time_for_the_source_is_told(frames_of):
    timings = {}
    with Pipeline.load(bundle_of("i2v-a14b"), "torch") as pipe:
        list(pipe.stream(PROMPT, timings=timings, **settings_of("i2v-a14b", {"image": FIRST})))
    assert set(timings) == {"text_s", "encode_s", "denoise_s", "decode_s"}


@pytest.mark.parametrize("variant", ["i2v-14b-480p", "i2v-a14b", "flf2v-14b"])
def test_official_sizes_follow_the_image(variant):
    """The first image's aspect ratio at the area of the size, its last as it is cut to that."""
    image = picture(101, 67)
    source = {"image": image, "fit": "area", **({"last_image": FIRST} if "flf" in variant else {})}
    with Pipeline.load(bundle_of(variant), "torch") as pipe:
        frames = pipe(PROMPT, **{**settings_of(variant, source), "size": (80, 64)}).frames
    width, height = size_by_area((101, 67), 80 * 64, "official")
    assert frames.shape == (5, height, width, 3)
    assert (width, height) != (80, 64)


def test_one_reference_needs_no_list():
    with Pipeline.load(bundle_of("vace-1.3b"), "torch") as pipe:
        for one in (FIRST, [FIRST], (FIRST,), Image.fromarray(FIRST)):
            source = pipe.resolve(PROMPT, size=(48, 32), reference_images=one).source
            assert np.array_equal(source.references, [FIRST])
        assert pipe.resolve(PROMPT, size=(48, 32), reference_images=None).source.references == ()
