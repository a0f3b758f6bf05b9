import math

import pytest

from ppl_diffusion.designs.question import (
    InputError,
    Job,
    MotifSpec,
    Question,
    Search,
    clamp_pattern,
    parse_fix,
    parse_forbid,
    parse_motif,
)


@pytest.mark.parametrize(
    ("suffix", "name", "weight"),
    [("", None, 1.0), (":2", None, 2.0), (":0.5", None, 0.5), ("@TBP", "TBP", 1.0)],
)
def test_parse_motif(tmp_path, suffix, name, weight):
    path = tmp_path / "m.meme"
    path.write_text("")
    assert parse_motif(f"{path}{suffix}") == MotifSpec(path, name, weight)


def test_parse_motif_with_name_and_weight(tmp_path):
    path = tmp_path / "m.meme"
    path.write_text("")
    assert parse_motif(f"{path}@MA0265.1:3") == MotifSpec(path, "MA0265.1", 3.0)


def test_parse_motif_refusals(tmp_path):
    (tmp_path / "m.meme").write_text("")
    with pytest.raises(InputError, match="There is no motif file"):
        parse_motif("nowhere.meme:2")
    with pytest.raises(InputError, match="is a folder: give one of its files"):
        parse_motif(f"{tmp_path}@M1")
    with pytest.raises(InputError, match=r"must be above 0 and at most 1e\+06, not nan"):
        parse_motif(f"{tmp_path / 'm.meme'}:nan")


def test_parse_fix():
    assert parse_fix("10:tataaa") == (10, "TATAAA")
    for text in ("TATAAA", "-1:TA", "3:", "x:TA", "3:T A", ""):
        with pytest.raises(InputError, match="write POS:BASES with positions counted from 0"):
            parse_fix(text)
    with pytest.raises(InputError, match="holds N: use only the letters ACGT"):
        parse_fix("3:TAN")


def test_parse_forbid():
    assert parse_forbid(" ggwcc") == "GGWCC"
    with pytest.raises(InputError, match="holds E, Z: use only the letters"):
        parse_forbid("ZEBRA")
    with pytest.raises(InputError, match="is empty"):
        parse_forbid("  ")


def test_clamp_pattern():
    assert clamp_pattern(((0, "AC"), (1, "C"), (8, "GT")), 10) == {0: "A", 1: "C", 8: "G", 9: "T"}
    with pytest.raises(InputError, match="run past the end of 10 bases: start at 8"):
        clamp_pattern(((9, "GT"),), 10)
    with pytest.raises(InputError, match="Position 1 is fixed to both C and G"):
        clamp_pattern(((0, "AC"), (1, "G")), 10)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"observe": math.nan}, "must be a finite number, not nan"),
        ({"temperature": 0.0}, "must be above 0, not 0.0"),
        ({"sd": -1.0}, "must be above 0, not -1.0"),
        ({"sd": math.inf}, "must be a finite number, not inf"),
        ({"gc": (0.6, 0.4)}, "is not a range of shares"),
        ({"gc": (math.nan, 0.4)}, "is not a range of shares"),
        ({"observe": 1.0, "temperature": 1.0}, "not both"),
        ({"observe": 1.0, "expression": False}, "contradicts"),
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


def test_settings_name_files_without_their_folder(tmp_path):
    job = Job("yeast-promoter", Question(motifs=(MotifSpec(tmp_path / "m.meme", None, 2.0),)))
    settings = job.settings()
    assert settings["question"]["motifs"] == [{"file": "m.meme", "name": None, "weight": 2.0}]
    assert str(tmp_path) not in str(settings)


def test_a_deviation_belongs_to_an_observation():
    assert Question(observe=13.0).sd == 0.5
    assert Question(observe=13.0, sd=0.3).sd == 0.3
    assert Question().sd is None
    with pytest.raises(InputError, match=r"--sd 0\.3 is the deviation of an observation"):
        Question(sd=0.3)
