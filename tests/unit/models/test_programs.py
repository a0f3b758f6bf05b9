"""Model programs: letters, chains, bounds and files."""

import json
import math

import pyro
import pytest
import torch

from ppl_diffusion import models
from ppl_diffusion.denoisers import MarkovDenoiser, TableDenoiser
from ppl_diffusion.kernels import Absorbing, Uniform
from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion

LENGTH = 6


class RowByRow:
    """The exact oracles know one time per call; the bounds ask for one per row."""

    def __init__(self, oracle):
        self.oracle = oracle
        self.vocab_size, self.kind, self.time_free = oracle.vocab_size, oracle.kind, False

    def __call__(self, tokens, t):
        if self.oracle.time_free:
            return self.oracle(tokens, 0.5)
        rows = [self.oracle(row, float(time)) for row, time in zip(tokens, t, strict=True)]
        return torch.stack(rows)


@pytest.fixture(params=[MaskedDiffusion, UniformDiffusion], ids=["masked", "uniform"])
def program(request):
    timed = request.param is UniformDiffusion
    return request.param.build(
        "ACGT", LENGTH, name="toy", dim=16, depth=1, heads=2, time_conditioning=timed
    )


def test_letters_round_trip(program):
    ids = program.encode("ACGTTA")
    assert ids.tolist() == [0, 1, 2, 3, 3, 0]
    assert ids.dtype == torch.int64
    assert program.decode(ids) == "ACGTTA"
    rows = program.encode(["ACGTTA", "TTTTTT"])
    assert rows.shape == (2, LENGTH)
    assert program.decode(rows) == ["ACGTTA", "TTTTTT"]
    assert program.encode([]).shape == (0, LENGTH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ACG", "a sequence has 6 letters, but 'ACG' has 3"),
        ("ACGTTN", "'N' at position 5 is not one of the letters A, C, G, T"),
        (["ACGTTA", "acgtta"], "'a' at position 0 is not one"),
    ],
)
def test_wrong_letters_are_named(program, text, message):
    with pytest.raises(ValueError, match=message):
        program.encode(text)


def test_wrong_ids_are_named(program):
    with pytest.raises(ValueError, match=r"shape \(6,\) or \(n, 6\), but was given \(5,\)"):
        program.decode(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids 0 to 3, but was given 0 to 4"):
        program.decode(torch.tensor([0, 0, 4, 0, 0, 0]))


@pytest.mark.parametrize("vocabulary", ["ACG", "ACGG"])
def test_vocabulary_must_fit_the_denoiser(program, vocabulary):
    with pytest.raises(ValueError, match="give one distinct symbol per token"):
        type(program)(program.denoiser, vocabulary=vocabulary, length=LENGTH)


def test_program_samples_one_path_site(program):
    trace = pyro.poutine.trace(program).get_trace(num_steps=5)
    assert trace.stochastic_nodes == ["path"]
    path = trace.nodes["path"]["value"]
    assert path.shape == (6, LENGTH)
    assert torch.equal(trace.nodes["_RETURN"]["value"], path[-1])
    assert torch.isfinite(trace.log_prob_sum())
    assert len(program.decode(path[-1])) == LENGTH


def test_chain_takes_steps_and_kappa(program):
    chain = program.chain(7, kappa=0.5)
    assert chain.event_shape == (8, LENGTH)
    assert chain.kernel.kappa.tolist() == [0.5] * 7
    assert isinstance(program.process, Absorbing | Uniform)


def test_loss_is_differentiable_and_seeded(program):
    rows = torch.randint(0, 4, (16, LENGTH))
    losses = [program.loss(rows, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    losses[0].backward()
    assert program.denoiser.vocabulary.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", [MaskedDiffusion, UniformDiffusion])
def test_bound_of_one_exact_token_is_its_code_length(family):
    """For ``L = 1`` the NELBO of the exact denoiser is ``-log p``; false alarm 2e-4 (4 s.e.)."""
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    process = family.build("abc", 1, dim=4, depth=1, heads=1).process
    program = family(RowByRow(TableDenoiser(law, process)), vocabulary="abc", length=1)
    rows = torch.arange(3)[:, None]
    terms = program.bound_terms(rows, num_times=2_000, generator=torch.Generator().manual_seed(3))
    error = terms.std(0) / math.sqrt(len(terms))
    assert ((terms.mean(0) + law.log()).abs() < 4 * error).all()
    assert (error < 0.1).all()


class Constant:
    """The cavity of a single token: there are no others to tell anything."""

    kind, time_free = "cavity", True

    def __init__(self, law):
        self.vocab_size, self.law = len(law), law

    def __call__(self, tokens, t):
        return self.law.log().expand(*tokens.shape, -1)


@pytest.mark.parametrize("family", [MaskedDiffusion, UniformDiffusion])
def test_loss_of_one_exact_token_is_its_code_length(family):
    """As above for the loss, whose times are others; false alarm 4e-4 (4 s.e., three means)."""
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    program = family(Constant(law), vocabulary="abc", length=1)
    for token in range(3):
        rows = torch.full((4_000, 1), token)
        losses = torch.stack([program.loss(rows) for _ in range(25)])
        error = float(losses.std()) / 5
        assert abs(float(losses.mean() + law[token].log())) < 4 * error
        assert error < 0.02


@pytest.mark.parametrize("family", [MaskedDiffusion, UniformDiffusion])
def test_bound_lies_above_the_entropy_and_loss_agrees(family):
    """Exact denoiser of a Markov chain: E[bound] >= entropy, and loss estimates the same mean.

    False-alarm rate below 2e-4 per family (one-sided and two-sided, 4 s.e.).
    """
    initial = torch.tensor([0.7, 0.3], dtype=torch.float64)
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    process = family.build("ab", 4, dim=4, depth=1, heads=1).process
    program = family(
        RowByRow(MarkovDenoiser(initial, transition, process)), vocabulary="ab", length=4
    )
    generator = torch.Generator().manual_seed(5)
    rows = torch.zeros(400, 4, dtype=torch.int64)
    rows[:, 0] = torch.multinomial(initial, 400, replacement=True, generator=generator)
    log_p = initial[rows[:, 0]].log()
    for k in range(1, 4):
        law = transition[rows[:, k - 1]]
        rows[:, k] = torch.multinomial(law, 1, generator=generator)[:, 0]
        log_p = log_p + law.gather(1, rows[:, k : k + 1])[:, 0].log()
    excess = program.bound_terms(rows, num_times=4, generator=generator).mean(0) + log_p
    error = float(excess.std()) / math.sqrt(len(rows))
    assert float(excess.mean()) > -4 * error
    losses = torch.stack([program.loss(rows, generator=generator) for _ in range(8)])
    difference = float(losses.mean()) - float((excess - log_p).mean())
    spread = math.hypot(float(losses.std()) / math.sqrt(8), error)
    assert abs(difference) < 4 * spread


def test_texts_with_line_breaks_are_read_and_written(tmp_path):
    program = UniformDiffusion.build("\n ,ab", 4, dim=4, depth=1, heads=1, time_conditioning=True)
    program.save(tmp_path)
    again = models.load(tmp_path)
    assert again.decode(again.encode(["a\n b", ",\n\n,"])) == ["a\n b", ",\n\n,"]
    with pytest.raises(ValueError, match=r"'c' at position 1 .* '\\n', ' ', ',', a, b; replace it"):
        program.encode("ac\n\n")
    assert "\n" not in repr(program)


def test_save_and_load_round_trip(program, tmp_path):
    program.save(tmp_path)
    again = models.load(tmp_path)
    rows = torch.randint(0, 4, (3, LENGTH))
    assert type(again) is type(program)
    assert (again.name, again.length, again.vocabulary) == ("toy", LENGTH, list("ACGT"))
    assert torch.equal(again.denoiser(rows, 0.5), program.denoiser(rows, 0.5))
    assert not any(p.requires_grad for p in again.denoiser.parameters())


def test_only_transformers_are_saved(tmp_path):
    process = Absorbing(2)
    law = torch.full((2, 2), 0.25, dtype=torch.float64)
    program = MaskedDiffusion(TableDenoiser(law, process), vocabulary="ab", length=2)
    with pytest.raises(TypeError, match="this one has a TableDenoiser"):
        program.save(tmp_path)


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"no prior 'yaest'.*human-promoter.*yeast-promoter"):
        models.load("yaest")


def test_folder_without_a_prior_is_refused(program, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"program\.json is missing"):
        models.load(tmp_path)
    program.save(tmp_path)
    for text in ("{", "[]", json.dumps({"family": "masked"}), json.dumps({"family": "odd"})):
        (tmp_path / "program.json").write_text(text)
        with pytest.raises(ValueError, match="describes no prior"):
            models.load(tmp_path)
