"""Programs live where their networks live, and so does what they compute."""

import dataclasses

import pytest
import torch

from ppl_diffusion import CapabilityError, models
from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion
from ppl_diffusion.models.distillation import Distillation
from ppl_diffusion.models.evaluate import evaluate
from ppl_diffusion.models.markov_baseline import MarkovBaseline
from ppl_diffusion.models.objectives import Curriculum
from ppl_diffusion.models.recipes import OBJECTIVES
from ppl_diffusion.models.training import train

ON_A_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
FAMILIES = [MaskedDiffusion, UniformDiffusion]


def loss(program, rows):
    return program.loss(rows)


def bound(program, rows):
    return program.bound_terms(rows, num_times=4, generator=torch.Generator("cpu").manual_seed(1))


def letters(program, rows):
    return program.encode(program.decode(rows))


def soft(program, rows):
    return Curriculum(program, steps=4, top_k=2).loss(rows, 0)


def dense(program, rows):
    return Curriculum(program, steps=4, top_k=None).loss(rows, 0)


def consistency(program, rows):
    return Distillation(program, steps=4, rounds=2).loss(rows, 0)


def code_length(program, rows):
    return MarkovBaseline(rows, 2, 6).bits(rows)


EVERYWHERE = [(family, compute) for family in FAMILIES for compute in (loss, bound, letters)]
UNIFORM = [(UniformDiffusion, compute) for compute in (soft, dense, consistency, code_length)]


@pytest.mark.parametrize(("family", "compute"), EVERYWHERE + UNIFORM)
def test_nothing_is_made_on_the_default_device(make_program, draw_rows, family, compute):
    """Where the default device is one that holds no numbers, the same numbers come out."""
    program, rows = make_program(family), draw_rows(8)
    torch.manual_seed(0)
    expected = compute(program, rows)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = compute(program, rows)
    assert torch.equal(found, expected)


def test_labels_are_withheld_where_they_live():
    program = MaskedDiffusion.build("ab", 2, dim=8, depth=1, heads=2, num_classes=2)
    rows, labels = torch.zeros(64, 2, dtype=torch.int64), torch.ones(64, dtype=torch.int64)
    torch.manual_seed(0)
    expected = program.loss(rows, labels=labels, label_dropout=0.5)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert torch.equal(program.loss(rows, labels=labels, label_dropout=0.5), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_moves_with_its_network(make_program, family):
    program = make_program(family)
    assert program.to("meta") is program
    assert program.device == torch.device("meta")
    assert program.encode("abcdef").device == torch.device("meta")


class Flat:
    """A denoiser that cannot be moved."""

    vocab_size, kind, time_free = 2, "cavity", True

    def __call__(self, tokens, t):
        return torch.full((*tokens.shape, 2), 0.5, device=tokens.device).log()


def test_a_program_that_cannot_be_moved_says_so():
    program = MaskedDiffusion(Flat(), vocabulary="ab", length=2)
    assert program.device == torch.device("cpu")
    with pytest.raises(CapabilityError, match="a Flat has no method `to`; build it with tensors"):
        program.to("meta")


@pytest.mark.parametrize("family", [pytest.param(f, marks=ON_A_DEVICE) for f in FAMILIES])
def test_samples_and_losses_on_an_accelerator(make_program, draw_rows, family):
    program = make_program(family).to("cuda")
    chain = program.chain(8)
    path = chain.sample((5,))
    assert path.device.type == "cuda"
    assert chain.log_prob(path).device.type == "cuda"
    assert len(program.decode(chain.x0(path))) == 5
    terms = program.bound_terms(draw_rows(8).to("cuda"), num_times=4)
    assert terms.device.type == "cuda"
    assert program.loss(draw_rows(8).to("cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=ON_A_DEVICE) for name in OBJECTIVES]
)
def test_training_on_an_accelerator(make_recipe, make_sequences, tmp_path, objective):
    """Letters that repeat: 2.58 bits before, far less after twenty steps; then resumed."""
    rows = torch.arange(6)[:, None].expand(6, 6).repeat(10, 1)
    data = make_sequences(rows, "abcdef")
    plain = make_recipe()
    first = train(
        "toy", out=tmp_path / "a", recipe=plain, sequences=data, quiet=True, device="cuda"
    )
    assert first.valid_bits < 2.3
    assert first.program.device.type == "cpu"
    recipe = dataclasses.replace(plain, steps=5).with_objective(objective)
    options = {"recipe": recipe, "sequences": data, "quiet": True, "device": "cuda"}
    options |= {"out": tmp_path / "b", "init": tmp_path / "a" / "prior"}
    assert train("toy", **options).steps == 5
    assert train("toy", resume=True, **options, steps=8).steps == 8
    program = models.load(tmp_path / "b" / "prior").to("cuda")
    assert evaluate(program, data, recipe, times=4).bound < 2.6
