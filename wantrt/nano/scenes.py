"""What a nano clip can show, the words for it, and which combinations training never sees.

A scene is a colour, a shape, a motion and a background. One combination of (colour, shape, motion)
in six is held out: ``held_out.jsonl`` beside this file lists the prompts made from them,
``held_out_i2v.jsonl`` the images and prompts.
"""

import json
import random
from dataclasses import asdict, dataclass
from itertools import cycle, islice, product
from pathlib import Path

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 225, 50),
    "green": (40, 165, 70),
    "cyan": (50, 205, 220),
    "blue": (40, 80, 220),
    "purple": (130, 60, 190),
    "pink": (245, 130, 195),
}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS: dict[str, RGB] = {
    "white": (238, 238, 238),
    "gray": (112, 112, 112),
    "black": (18, 18, 18),
}
# motion -> ways to say it; the first is the plain one
MOTIONS: dict[str, tuple[str, ...]] = {
    "right": ("moves right", "moves to the right", "slides right", "moving right"),
    "left": ("moves left", "moves to the left", "slides left", "moving left"),
    "up": ("moves up", "rises", "goes up", "moving up"),
    "down": ("moves down", "falls", "goes down", "moving down"),
    "bounce": ("bounces", "bounces up and down", "jumps up and down", "bouncing"),
    "grow": ("grows", "gets bigger", "grows larger", "growing"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "shrinking"),
    "rotate": ("rotates", "spins", "turns around", "rotating"),
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "ball", "dot"),
    "square": ("box", "block"),
    "gray": ("grey",),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "pink": ("magenta",),
}

HELD_OUT_FILE = Path(__file__).with_name("held_out.jsonl")
HELD_OUT_I2V_FILE = Path(__file__).with_name("held_out_i2v.jsonl")
_SPLIT_SEED = 7
_HELD_OUT_SHARE = 0.18


@dataclass(frozen=True)
class Scene:
    """What one clip shows, by name. ``background`` is "white", "gray" or "black"."""

    colour: str
    shape: str
    motion: str
    background: str = "white"

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.motion


def combinations() -> list[tuple[str, str, str]]:
    """All (colour, shape, motion) that make sense: nobody can see a plain circle rotate."""
    every = product(COLOURS, SHAPES, MOTIONS)
    return [(c, s, m) for c, s, m in every if not (s == "circle" and m == "rotate")]


def split() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """(training combinations, held-out combinations), always the same.

    Every pair of two words stays in training with some third one, so that a held-out prompt asks
    for a new combination of known words. "a red circle moves right" is for the README: training.
    """
    shuffled = combinations()
    random.Random(_SPLIT_SEED).shuffle(shuffled)
    shuffled.remove(("red", "circle", "right"))
    count = round(_HELD_OUT_SHARE * len(combinations()))
    held_out = shuffled[:count]
    return [("red", "circle", "right"), *shuffled[count:]], held_out


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many ways to say a scene; about half of them plain, half naming the background."""
    plain = rng.random() < 0.5
    phrase = MOTIONS[scene.motion][0] if plain else rng.choice(MOTIONS[scene.motion])
    words = [w if plain else _vary(w, rng) for w in (scene.colour, scene.shape)]
    article = "a" if plain else rng.choice(_ARTICLES)
    text = " ".join([article, *words, phrase])
    if rng.random() < 0.5:
        ending = "on a {} background" if plain else rng.choice(_BACKGROUND_PHRASES)
        text += " " + ending.format(_vary(scene.background, rng))
    return _grammatical(text)


def caption_words() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    synonyms = [word for words in SYNONYMS.values() for word in words]
    phrases = [phrase for phrases in MOTIONS.values() for phrase in phrases]
    texts = [*_ARTICLES, *COLOURS, *SHAPES, *BACKGROUNDS, *synonyms, *phrases, *_BACKGROUND_PHRASES]
    return list(dict.fromkeys(" ".join(texts).replace("{}", "").split()))


def held_out_prompts() -> list[dict[str, str | int]]:
    """The evaluation's prompts: per held-out combination, the plain caption and four others."""
    rng = random.Random(_SPLIT_SEED)
    prompts: list[dict[str, str | int]] = []
    for colour, shape, motion in split()[1]:
        says = {_grammatical(f"a {colour} {shape} {MOTIONS[motion][0]}"): None}
        while len(says) < 5:
            scene = Scene(colour, shape, motion, rng.choice(list(BACKGROUNDS)))
            says[caption(scene, rng)] = None
        for text in says:
            entry = {"prompt": text, "colour": colour, "shape": shape, "motion": motion}
            prompts.append({**entry, "seed": len(prompts)})
    return prompts


def held_out_cases() -> list[dict[str, str | int]]:
    """The evaluation's cases that start from an image: the scene to draw, and a caption of it."""
    rng = random.Random(_SPLIT_SEED)
    cases: list[dict[str, str | int]] = []
    for combination in islice(cycle(split()[1]), 60):
        scene = Scene(*combination, rng.choice(list(BACKGROUNDS)))
        cases.append({"prompt": caption(scene, rng), **asdict(scene), "seed": len(cases)})
    return cases


def load_held_out(file: Path = HELD_OUT_FILE) -> list[dict[str, str | int]]:
    """A committed list: prompt, seed, and what the video must show, besides what an image shows."""
    return [json.loads(line) for line in file.read_text().splitlines()]


_ARTICLES = ("a", "a", "the", "one", "", "an", "a video of a", "there is a")
_BACKGROUND_PHRASES = (
    "on a {} background",
    "on {}",
    "over a {} background",
    "in front of a {} background",
    "against a {} wall",
)


def _grammatical(text: str) -> str:
    words = text.split()
    for i in range(len(words) - 1):
        if words[i] in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return " ".join(words)


def _vary(word: str, rng: random.Random) -> str:
    """Sometimes another word for the same thing."""
    return rng.choice(SYNONYMS.get(word, (word,))) if rng.random() < 0.3 else word
