import json
from itertools import combinations as pairs

from wantrt.nano.scenes import (
    COLOURS,
    HELD_OUT_FILE,
    HELD_OUT_I2V_FILE,
    MOTIONS,
    combinations,
    held_out_cases,
    held_out_prompts,
    load_held_out,
    split,
)


def test_a_sixth_of_the_combinations_is_held_out():
    training, held_out = split()
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(combinations())
    assert 0.15 <= len(held_out) / len(combinations()) <= 0.20


def test_training_knows_every_pair_of_words():
    def pairs_of(some):
        return {pair for combination in some for pair in pairs(combination, 2)}

    assert pairs_of(split()[0]) == pairs_of(combinations())


def test_the_readme_prompt_is_one_that_training_sees():
    assert ("red", "circle", "right") in split()[0]


def test_the_committed_list_is_the_generated_one_and_shows_only_held_out_combinations():
    prompts = load_held_out()
    assert len(prompts) >= 200
    assert len({entry["prompt"] for entry in prompts}) == len(prompts)
    assert prompts == held_out_prompts()
    training = set(split()[0])
    for entry in prompts:
        assert (entry["colour"], entry["shape"], entry["motion"]) not in training
        assert any(colour in entry["prompt"] for colour in (*COLOURS, "violet", "turquoise", "mag"))


def test_cases_that_start_from_an_image_are_held_out_too_and_say_what_they_show():
    cases = load_held_out(HELD_OUT_I2V_FILE)
    assert len(cases) == 60
    assert cases == held_out_cases()
    assert {(c["colour"], c["shape"], c["motion"]) for c in cases} == set(split()[1])
    for case in cases:
        said = [phrase for phrase in MOTIONS[case["motion"]] if phrase in case["prompt"]]
        assert said, case


def test_the_list_is_json_lines_with_a_prompt_and_a_seed():
    for line in HELD_OUT_FILE.read_text().splitlines():
        entry = json.loads(line)
        assert isinstance(entry["prompt"], str)
        assert isinstance(entry["seed"], int)
