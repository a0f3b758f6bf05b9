"""The measures of sample quality see what they should, and their conclusions follow the numbers."""

import json
import math

import numpy as np
import pytest
import torch
import typer
from bench import module
from rich.console import Console
from typer.testing import CliRunner

from ppl_diffusion.models.masked import MaskedDiffusion
from ppl_diffusion.models.uniform import UniformDiffusion


def program(family=UniformDiffusion):
    torch.manual_seed(0)
    shape = {"dim": 8, "depth": 1, "heads": 2}
    made = family.build("ACGT", 80, name="tiny", **shape)
    made.denoiser.requires_grad_(False)
    return made


def reference():
    return module("_references").find_reference("ACGT", 80)


def line(method, steps, value, *, se=0.01):
    coordinates = {"prior": "p", "method": method, "num_steps": steps, "se": se}
    return module("quality").Row("word_divergence", value, "nats", 4, None, coordinates)


def test_words_and_entropy_by_hand():
    references = module("_references")
    assert references.words(["AAB", "AB"], 2) == {"AA": 1 / 3, "AB": 2 / 3}
    assert references.words(["AAB", "AB"], 2, [1.0, 4.0])["AB"] == pytest.approx(5 / 6)
    assert references.letter_entropy("AABB") == pytest.approx(math.log(2))
    assert references.letter_entropy("AAAA") == 0
    assert references.mean_entropy(["AABB", "AAAA"]) == pytest.approx(math.log(2) / 2)


def test_jensen_shannon_by_hand():
    divergence, half = module("_references").jensen_shannon, np.array([0.5, 0.5])
    first, second = np.eye(2)
    by_hand = (math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)) / 2
    assert divergence(first, first) == 0
    assert divergence(np.eye(2), second) == pytest.approx([math.log(2), 0])
    assert divergence(first, half) == pytest.approx(by_hand)


def test_standard_errors_of_a_divergence():
    """Those of 24 sequences match the spread of 40 such sets within a factor of 1.6.

    The spread of 40 values has a relative error of 0.11: false alarm below 1e-4.
    """
    found, rng = reference(), np.random.default_rng(0)
    letters = [list(rng.choice(list("AACGT"), 80)) for _ in range(40 * 24)]
    texts = ["".join(row) for row in letters]
    measured = [found.divergence(texts[k : k + 24]) for k in range(0, len(texts), 24)]
    ratio = np.mean([error for _, error in measured]) / np.std([value for value, _ in measured])
    assert 1 / 1.6 < ratio < 1.6


def test_the_committed_table():
    for found in module("_references").load_references():
        assert found.families <= found.rows
        assert 0 < found.entropy < math.log(len(found.vocabulary))
        floors = [found.floors[n][0] for n in sorted(found.floors)]
        assert floors == sorted(floors, reverse=True)
        for half in found.halves:
            assert sum(half.values()) == pytest.approx(1, abs=1e-4)
            assert {len(word) for word in half} == {found.order}


def test_repetitive_and_random_samples_are_both_found_out():
    """Flat letters lie above the floor and one repeated word far above it, with low entropy."""
    found, rng = reference(), np.random.default_rng(0)
    flat = ["".join(rng.choice(list("ACGT"), 80)) for _ in range(48)]
    floor, spread = found.floors[48]
    repetitive = ["ACGTAAAA" * 10] * 48
    assert found.divergence(repetitive)[0] > floor + 20 * spread
    assert found.divergence(flat)[0] > 0
    assert found.divergence(repetitive)[1] == pytest.approx(0, abs=1e-12)
    assert module("_references").mean_entropy(["AAAAAAAT" * 10]) < found.entropy - 0.5
    assert module("_references").mean_entropy(flat) > found.entropy


def test_unknown_sequences_are_refused():
    with pytest.raises(ValueError, match="no held-out statistics for sequences of 7 letters"):
        module("_references").find_reference("AB", 7)


def test_families_of_near_copies():
    near = module("_references").near_copies
    assert near(["AAAAAA", "CCCCCC", "AAAAAC", "CCCCCC", "GTGTGT"]) == [0, 1, 0, 1, 2]
    held = module("_references").HeldOut(["AA", "AA", "CC"], np.array([0, 0, 1]))
    assert held.words(1) == {"A": 0.5, "C": 0.5}
    assert held.half(1).texts == ["CC"]
    drawn = held.draw(4000, np.random.default_rng(0))
    assert abs(drawn.count("CC") / 4000 - 0.5) < 5.5 * 0.5 / math.sqrt(4000)  # fails once in 1e7


@pytest.mark.parametrize("family", [UniformDiffusion, MaskedDiffusion])
def test_rows_of_a_prior(family):
    quality = module("quality")
    methods = quality.make_plan(program(family), quick=True).methods
    plan = quality.Plan(methods, (4, 8), 8)
    console = Console(record=True, width=200)
    rows = quality.measure_prior(program(family), reference(), plan, console)
    quality.print_prior(rows, console)
    json.dumps([row.flat() for row in rows], allow_nan=False)
    lines = [row for row in rows if row.name == "word_divergence"]
    for row in lines:
        c = row.coordinates
        assert row.value > 0
        assert c["sequences"] == 8
        assert c["evaluations"] <= c["num_steps"]
        assert (c["corrections"] > 0) == (c["method"] not in ("ancestral", "first-hitting"))
    assert {row.coordinates["method"] for row in lines} == set(methods)
    if family is MaskedDiffusion:
        assert lines[-1].coordinates["network_calls"] == 80  # first hitting
    assert "ancestral: from 4 to 8 steps" in console.export_text()


def test_conclusions_follow_the_numbers():
    quality = module("quality")
    rows = [line("ancestral", n, v) for n, v in ((16, 0.5), (64, 0.31), (256, 0.3))]
    rows += [line("psi", n, v) for n, v in ((16, 0.5), (64, 0.3), (256, 0.2))]
    said = [quality.sentence(row) for row in quality.conclude(rows)]
    assert "ancestral: from 64 to 256 steps the divergence has saturated" in said[0]
    assert "psi: from 64 to 256 steps the divergence falls: it keeps improving" in said[1]
    assert "psi: ends below ancestral sampling (0.1000" in said[2]
    worse = [line("ancestral", 16, 0.1), line("ancestral", 64, 0.3)]
    assert "gets worse" in quality.sentence(next(iter(quality.conclude(worse))))
    level = [line("ancestral", 16, 0.1), line("psi", 16, 0.11)]
    assert "ends level with" in quality.sentence(next(iter(quality.conclude(level))))


def test_command_line(tmp_path, monkeypatch):
    quality = module("quality")
    monkeypatch.setattr(quality, "make_plan", lambda *_: quality.Plan(["ancestral"], (1, 2), 8))
    program().save(tmp_path / "prior")
    out, app = tmp_path / "rows.json", typer.Typer()
    app.command()(quality.main)
    options = ["--prior", str(tmp_path / "prior"), "--prior", "no-such-prior", "--json", str(out)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert "Left out:" in result.output
    names = [row["name"] for row in json.loads(out.read_text())]
    assert names == ["word_divergence", "word_divergence", "gain_of_last_steps"]
