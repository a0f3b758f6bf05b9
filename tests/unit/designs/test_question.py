import math

import pytest

from ppl_diffusion.designs.alphabet import Alphabet
from ppl_diffusion.designs.flags import Asked, parse_reward
from ppl_diffusion.designs.question import Job, Question, parse_fix, parse_motif
from ppl_diffusion.designs.reward_spec import RewardSpec, read_reward
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.tokenisers import find_alphabet

DNA, RNA = Alphabet(tuple("ACGT")), Alphabet(tuple("ACGU_"), padding=4)
SMILES = Alphabet(("C", "Cl", "O", "_"), 3, find_alphabet("smiles").with_symbols(("C", "Cl", "O")))


@pytest.mark.parametrize(
    ("suffix", "at", "name", "weight"),
    [
        ("", "", "motif_m", 1.0),
        (":2", "", "motif_m", 2.0),
        (":0.5", "", "motif_m", 0.5),
        ("@TBP", "@TBP", "motif_TBP", 1.0),
        ("@MA0265.1:3", "@MA0265.1", "motif_MA0265.1", 3.0),
    ],
)
def test_parse_motif(tmp_path, suffix, at, name, weight):
    path = tmp_path / "m.meme"
    path.write_text("")
    spec = parse_motif(f"{path}{suffix}")
    assert spec == RewardSpec(name, "motif", f"{path}{at}", weight=weight)


def test_parse_motif_refusals(tmp_path):
    (tmp_path / "m.meme").write_text("")
    with pytest.raises(InputError, match="There is no motif file"):
        parse_motif("nowhere.meme:2")
    with pytest.raises(InputError, match="is a folder: give one of its files"):
        parse_motif(f"{tmp_path}@M1")
    with pytest.raises(InputError, match=r"must be above 0 and at most 1e\+06, not nan"):
        parse_motif(f"{tmp_path / 'm.meme'}:nan")


def test_parse_fix():
    assert parse_fix("10:tataaa") == (10, "tataaa")
    for text in ("TATAAA", "-1:TA", "3:", "x:TA", "3:T A", ""):
        with pytest.raises(InputError, match="write POS:BASES with positions counted from 0"):
            parse_fix(text)


def test_fixed_tokens_become_a_pattern():
    assert DNA.pattern((), 4) is None
    assert DNA.pattern(((0, "ac"), (1, "C"), (3, "T")), 5).tolist() == [0, 1, -1, 3, -1]
    assert SMILES.pattern(((1, "ClO"),), 4).tolist() == [-1, 1, 2, -1]
    with pytest.raises(InputError, match="run past the end of 10 bases: start at 8"):
        DNA.pattern(((9, "GT"),), 10)
    with pytest.raises(InputError, match="Position 1 is fixed to both C and G"):
        DNA.pattern(((0, "AC"), (1, "G")), 10)
    with pytest.raises(InputError, match="The fixed bases '3:TAN' holds N: use only the letters A"):
        DNA.pattern(((3, "TAN"),), 10)
    with pytest.raises(InputError, match=r"The fixed tokens '0:CBr' cannot be read: .*'Br' as tok"):
        SMILES.pattern(((0, "CBr"),), 4)


def test_forbidden_pieces_are_read_by_the_letters_of_the_prior():
    assert DNA.forbid(" ggwcc").motif == "GGWCC"
    assert DNA.forbid("GGWCC").both_strands
    assert RNA.forbid("gguu").motif == "GGTT"
    assert not RNA.forbid("gguu").both_strands
    assert SMILES.forbid("ClC").tokens == [1, 0]
    with pytest.raises(InputError, match="holds E, Z: use only the letters"):
        DNA.forbid("ZEBRA")
    with pytest.raises(InputError, match="is empty"):
        DNA.forbid("  ")
    with pytest.raises(InputError, match="A GC content is one of bases"):
        SMILES.gc(0.1, 0.2)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"observe": math.nan}, "must be a finite number, not nan"),
        ({"temperature": 0.0}, "must be above 0, not 0.0"),
        ({"sd": -1.0}, "must be above 0, not -1.0"),
        ({"sd": math.inf}, "must be a finite number, not inf"),
        ({"sd": 0.3}, r"--sd 0\.3 is the deviation of an observation"),
        ({"observe": 1.0, "temperature": 1.0}, "not both"),
        ({"observe": 1.0, "expression": False}, "contradicts"),
    ],
)
def test_impossible_options(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        Asked(**wrong)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"gc": (0.6, 0.4)}, "is not a range of shares"),
        ({"gc": (math.nan, 0.4)}, "is not a range of shares"),
        ({"lengths": (5, 4)}, "longest length must be at least 5, not 4"),
        ({"rewards": (RewardSpec("a", "oracle", "x"),) * 2}, "Two scores are called 'a'"),
    ],
)
def test_impossible_questions(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        Question(**wrong)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"num_particles": -1}, "number of particles must be at least 2, not -1"),
        ({"num_runs": 0}, "number of runs must be at least 1, not 0"),
        ({"num_steps": 0}, "number of steps must be at least 1, not 0"),
        ({"seed": -1}, "Seed must be at least 0, not -1"),
        ({"seed": 2**48}, "Seed must be at most"),
        ({"num_particles": 10**11}, "number of particles must be at most"),
        ({"options": {"twist": "plier"}}, "no twist called 'plier': choose one of .*argmax"),
        ({"resampler": "dice"}, "no resampler called 'dice'"),
        ({"ess_threshold": math.nan}, "between 0 and 1, not nan"),
    ],
)
def test_impossible_searches(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        Search(**wrong)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"python": "m:f", "temprature": 1}, "R has no key 'temprature': it has answer, at_most,"),
        ({}, "R says none of where its score comes from: give one of oracle, python, torch,"),
        ({"python": "m:f", "command": "x"}, "R says python and command of where its score"),
        ({"python": 3}, "R: python is 3; give a text."),
        ({"python": "m:f", "temperature": "hot"}, "R: temperature is 'hot'; give a number."),
        ({"python": "m:f", "temperature": 0.0}, "temperature of reward 'f' must be above 0, not 0"),
        ({"python": "m:f", "goal": "win"}, "The goal of reward 'f' is 'win': choose one of max"),
        ({"python": "m:f", "between": [1]}, "R: between is [1]; give two numbers."),
        ({"python": "m:f", "between": [2, 1]}, "The range of reward 'f' runs from 2.0 to 1.0"),
        ({"python": "m:f", "between": [1, 2], "observed": 3}, "has between and observed, which"),
        ({"python": "m:f", "sd": 1}, "has a standard deviation and nothing it is the deviation"),
        ({"python": "m:f", "name": "gc"}, "A score cannot be called 'gc', as another column of"),
        ({"python": "m:f", "name": "x_sd"}, "A score cannot be called 'x_sd', as another column"),
        ({"python": "m:f", "weight": -1}, "weight of reward 'f' must be above 0 and at most"),
        ({"python": "m:f", "transform": "sigmoid"}, "give a table with its kind"),
    ],
)
def test_impossible_rewards(entry, sentence):
    with pytest.raises(InputError) as caught:
        read_reward(entry, "R")
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_function_called_as_a_column_is_scored_under_another_name():
    assert read_reward({"python": "m:gc"}, "R").name == "gc_score"


def test_a_judge_has_no_goal():
    with pytest.raises(InputError, match="J has no key 'temperature'"):
        read_reward({"python": "m:f", "temperature": 1.0}, "J", judge=True)


def test_rewards_of_the_command_line():
    spec = parse_reward("scores:gc_pull,temperature=0.2,goal=minimise,workers=4", "python")
    assert (spec.name, spec.at, spec.temperature) == ("gc_pull", "scores:gc_pull", 0.2)
    assert (spec.goal, dict(spec.options)) == ("minimise", {"workers": 4})
    assert parse_reward("nets:model,head=2", "torch").head == 2
    with pytest.raises(InputError, match=r"Cannot read 'fast' of the reward .*: write KEY=VALUE"):
        parse_reward("scores:gc_pull,fast", "python")


def test_settings_name_files_without_their_folder(tmp_path):
    spec = RewardSpec("motif_m", "motif", str(tmp_path / "m.meme"), weight=2.0)
    settings = Job("yeast-promoter", Question(rewards=(spec,))).settings()
    wanted = {"name": "motif_m", "motif": "m.meme", "weight": 2.0}
    assert settings["question"]["rewards"] == [wanted]
    assert str(tmp_path) not in str(settings)


def test_options_change_what_a_brief_says():
    spec = RewardSpec("e", "oracle", "o", temperature=0.4, at_most=17.0)
    job = Job("p", Question(rewards=(spec,), forbid=("GG",), gc=(0.1, 0.9)))
    (seen,) = Asked(observe=13.0).change(job).question.rewards
    assert (seen.observed, seen.sd, seen.temperature, seen.at_most) == (13.0, 0.5, None, 17.0)
    (hot,) = Asked(temperature=2.0).change(job).question.rewards
    assert hot.temperature == 2.0
    own = RewardSpec("f", "python", "m:f")
    changed = Asked(expression=False, rewards=(own,), forbid=("CC",), gc=(0.2, 0.3)).change(job)
    assert changed.question == Question(rewards=(own,), forbid=("GG", "CC"), gc=(0.2, 0.3))
    with pytest.raises(InputError, match="has no expression oracle"):
        Asked(observe=1.0).change(Job("p"))
