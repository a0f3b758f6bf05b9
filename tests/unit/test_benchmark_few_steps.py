"""Rows of the comparison at few evaluations are what they say, on tiny networks."""

import json
import math
from pathlib import Path as Folder

import pytest
import torch
import typer
from bench import module
from rich.console import Console
from typer.testing import CliRunner

from ppl_diffusion.kernels.path import Path
from ppl_diffusion.models import ForwardLearned, LatentDiffusion, MaskedDiffusion

ROOT = str(Folder(__file__).parents[2])
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
TINY = {"dim": 8, "depth": 1, "heads": 2}
CODES = {"num_slots": 2, "num_codes": 4, "latent_dim": 4, "encoder_depth": 1}
VECTORS = {"num_slots": 2, "latent_dim": 3, "encoder_depth": 1}


def build(family, name, **shape):
    torch.manual_seed(0)
    program = family.build(LETTERS, 15, name=name, **TINY, **shape)
    program.denoiser.requires_grad_(False)
    return program


@pytest.fixture(scope="module")
def priors():
    return {
        "masked-names": build(MaskedDiffusion, "masked-names"),
        "latent-names": build(LatentDiffusion, "latent-names", **CODES),
        "latent-names-co": build(LatentDiffusion, "latent-names-co", **VECTORS),
        **{
            name: build(ForwardLearned, name, num_steps=steps)
            for steps in (2, 4, 10)
            if (name := f"learned-names-{steps}")
        },
    }


@pytest.fixture
def rows():
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(27, (32, 15), generator=source)
    return module("_short_samples").HeldOutRows(ids, ids[:8], ids[8:], LETTERS)


@pytest.fixture
def case(rows):
    reference = module("_references").find_reference(LETTERS, 15)
    return module("few_steps").Case("names", reference, rows)


def by_method(priors):
    methods = module("_few_step_methods").METHODS
    return {name: priors[method.prior_name("names")] for name, method in methods.items()}


def line(method, evaluations, value, se=0.01):
    where = {"dataset": "d", "method": method, "evaluations": evaluations, "se": se}
    return module("_report").Row("few_steps", value, "nats", 4, None, where)


def test_every_method_takes_the_evaluations_it_says(priors):
    for name, program in by_method(priors).items():
        method = module("_few_step_methods").METHODS[name]
        for evaluations in filter(method.takes, (1, 2, 4, 8, 10)):
            chain, path = method.chain(program, evaluations)
            assert chain.num_steps == evaluations
            assert method.steps is None or path == f"learned({evaluations})"


def test_paths_in_words(priors):
    describe = module("_few_step_methods").describe_path
    methods, program = module("_few_step_methods").METHODS, priors["latent-names"]
    assert describe(Path.masked(3)) == "masked(3)"
    assert describe(Path.ordered(4)) == "ordered(4)"
    assert methods["di-seq"].chain(program, 8)[1] == "seq(2+6)"  # two slots
    assert methods["co-seq"].chain(priors["latent-names-co"], 8)[1] == "seq(4+4)"
    assert methods["di-ordered"].chain(program, 8)[1] == "ordered(4)"
    assert methods["di-ordered"].chain(program, 1)[1] == "masked(1)"


def test_bounds_are_those_of_the_chain(priors, rows):
    """An untrained network predicts all letters alike: log2(27) bits, and log2(4) a code."""
    bits, slots = math.log2(27), 2 * math.log2(4) / 15
    for name, program in by_method(priors).items():
        method = module("_few_step_methods").METHODS[name]
        for evaluations in (1, 4) if method.steps is None else ():
            found = method.bound(program, evaluations, rows.test)
            if method.solver is not None:
                assert found is None
            elif not name.startswith("co"):
                latent = 0.0 if name == "masked" or evaluations == 1 else slots
                assert found.shape == (8,)
                # Hidden tokens and codes vary in number: 8 terms of 8 rows, within 5 errors.
                assert float(found.mean()) == pytest.approx(bits + latent, rel=0.25)


def test_an_order_is_learned_for_its_path(priors, rows, monkeypatch):
    """From training rows, or where there are none from the prior's own."""
    few = module("_few_step_methods")
    monkeypatch.setattr(few, "_ORDER_STEPS", 2)
    monkeypatch.setattr(few, "_OWN_ROWS", 16)
    method, program = few.METHODS["di-seq-order"], priors["latent-names"]
    for seen in (rows.train, None):
        ready = method.ready(program, 4, seen)
        assert program.order is None
        assert ready.order.token_steps == 2
        assert method.chain(ready, 4)[1] == "seq(2+2)"
        assert method.bound(ready, 4, rows.test).shape == (8,)
    assert few.METHODS["di-seq"].ready(program, 4, rows.train) is program


def test_parameters_leave_the_encoder_out(priors):
    count = module("_few_step_methods").count_parameters
    network = priors["latent-names"].denoiser
    whole = sum(p.numel() for p in network.parameters()) + network.codebook.numel()
    encoder = sum(p.numel() for p in network.encoder.parameters())
    assert count(priors["latent-names"]) == whole - encoder < whole
    plain = priors["masked-names"].denoiser
    assert count(priors["masked-names"]) == sum(p.numel() for p in plain.parameters())
    learned = priors["learned-names-2"].denoiser
    asked = [*learned.reverse.parameters(), *learned.next.parameters()]
    assert count(priors["learned-names-2"]) == sum(p.numel() for p in asked)


def test_the_bound_of_learned_noise_is_that_of_its_chain(priors, rows):
    method, program = module("_few_step_methods").METHODS["learned-2"], priors["learned-names-2"]
    found = method.bound(program, 2, rows.test)
    source = torch.Generator().manual_seed(1)
    terms = program.bound_terms(rows.test, num_times=64, generator=source) / 15 / math.log(2)
    assert found.shape == (8,)
    assert float(found.mean()) == pytest.approx(float(terms.mean()), rel=0.1)


def test_rows_of_a_data_set(priors, case, monkeypatch):
    few = module("few_steps")
    monkeypatch.setattr(few, "EVALUATIONS", (1, 2))
    console = Console(record=True, width=200)
    found = few.measure_dataset(case, by_method(priors), few.Plan(256, 8), console)
    json.dumps([row.flat() for row in found], allow_nan=False)
    lines = [row.flat() for row in found if row.name == "few_steps"]
    assert {(r["method"], r["evaluations"]) for r in lines} == {
        (name, evaluations)
        for name in by_method(priors)
        for evaluations in (1, 2)
        if module("_few_step_methods").METHODS[name].takes(evaluations)
    }
    for row in lines:
        assert row["value"] > row["floor"] > 0  # untrained
        assert (row["bound"] is None) == (row["method"] in ("co-seq-wide", "co-seq-dpm"))
        assert row["known"] == 0.0
        assert (row["left_per_step"] is None) == (row["bound"] is None)
        assert row["valid"] is None
    assert "Parameters at sampling: masked-names" in console.export_text()


def test_comparisons_follow_the_numbers():
    few = module("few_steps")
    lines = [line("masked", 1, 0.5), line("masked", 4, 0.4), line("masked", 16, 0.2)]
    lines += [line("di-seq", 1, 0.6), line("di-seq", 4, 0.3), line("di-seq", 16, 0.3)]
    found = list(few.compare(lines))
    assert [row.coordinates["evaluations"] for row in found] == [4, 16]
    assert [row.ok for row in found] == [True, None]
    assert "di-seq at 4 evaluations: below masked (-0.1000" in few.sentence(found[0])
    assert "above masked" in few.sentence(found[1])
    (level,) = few.compare([line("masked", 4, 0.3), line("di-seq", 4, 0.31)])
    assert "level with masked" in few.sentence(level)
    assert not level.ok


def test_command_line(tmp_path, priors, monkeypatch):
    few = module("few_steps")
    monkeypatch.setattr(few, "EVALUATIONS", (1, 2))
    monkeypatch.setattr(few, "QUICK", few.Plan(256, 8))
    for name in ("masked-names", "latent-names"):
        priors[name].save(tmp_path / name / ("prior" if "latent" in name else ""))
    out, app = tmp_path / "rows.json", typer.Typer()
    app.command()(few.main)
    options = ["--quick", "--priors", str(tmp_path), "--json", str(out)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert "co-seq on names is left out" in result.output
    found = json.loads(out.read_text())
    assert {row["method"] for row in found} == {"masked", "di-seq", "di-ordered"}  # orders from 4
    assert all(row["bound"] is None for row in found if row["name"] == "few_steps")
