"""A prior that learnt classes serves guidance without a classifier."""

import inspect

import pyro
import pytest
import torch
from pyro.distributions import Categorical

from ppl_diffusion import CapabilityError
from ppl_diffusion.denoisers import Transformer
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import ClassifierFreeKernel, InterpolatingKernel
from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion, load

STEPS = 250
SHAPE = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "num_classes": 2}


def rows(count, generator):
    """Class 0 holds mostly a, class 1 mostly b, over sequences of two letters."""
    labels = torch.randint(2, (count,), generator=generator)
    own = torch.rand((count, 2), generator=generator) < 0.75
    return torch.where(own, labels[:, None], 1 - labels[:, None]), labels


@pytest.fixture(scope="module", params=[MaskedDiffusion, UniformDiffusion])
def trained(request, tmp_path_factory):
    torch.manual_seed(0)
    time = {"time_conditioning": request.param is UniformDiffusion}
    program = request.param.build("ab", 2, name="classes", **SHAPE, **time)
    network = program.denoiser.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch, labels = rows(128, generator)
        optimizer.zero_grad()
        program.loss(batch, labels=labels, generator=generator).backward()
        optimizer.step()
        schedule.step()
    folder = tmp_path_factory.mktemp("prior")
    program.save(folder)
    return load(folder)


def share_of_b(program, weight, label=1):
    kernel = ClassifierFreeKernel(
        program.process, program.labelled(label), program.labelled(None), weight=weight, num_steps=8
    )
    chain = ReverseChain(kernel, program.length)
    return float(chain.marginal().log_prob(torch.tensor([1, 1])).exp())


def test_weights_move_from_no_class_to_the_class_and_beyond(trained):
    """The data have .3125 at weight 0 and .5625 at weight 1; training is short."""
    none, own, beyond = (share_of_b(trained, weight) for weight in (0.0, 1.0, 3.0))
    assert none == pytest.approx(0.3125, abs=0.08)
    assert own == pytest.approx(0.5625, abs=0.08)
    assert own + 0.1 < beyond < 1
    assert share_of_b(trained, 1.0, label=0) < none


def test_networks_without_classes_say_so():
    plain = MaskedDiffusion.build("ab", 2, dim=8, depth=1, heads=2)
    with pytest.raises(CapabilityError, match="build it with num_classes"):
        plain.loss(torch.zeros(3, 2, dtype=torch.int64), labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises((CapabilityError, ValueError), match="class"):
        plain.labelled(0)


@pytest.mark.parametrize(
    ("labels", "dropout"),
    [
        (torch.zeros(2, dtype=torch.int64), 0.1),
        (torch.zeros(3), 0.1),
        (torch.tensor([0, 1, 2]), 0.1),
        (torch.zeros(3, dtype=torch.int64), float("nan")),
        (torch.zeros(3, dtype=torch.int64), 2.0),
    ],
)
def test_labels_are_one_class_per_row(labels, dropout):
    program = MaskedDiffusion.build("ab", 2, dim=8, depth=1, heads=2, num_classes=2)
    rows = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"one class in 0\.\.1|label_dropout must lie"):
        program.loss(rows, labels=labels, label_dropout=dropout)
    with pytest.raises(ValueError, match=r"label must lie in 0\.\.1"):
        program.labelled(2)
    for label in ("three", 0.5):
        with pytest.raises(ValueError, match=rf"label must lie in 0\.\.1, .* got {label!r}"):
            program.labelled(label)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), torch.tensor(-1), torch.zeros(2).bool()],
)
def test_given_labels_are_classes(labels):
    program = MaskedDiffusion.build("ab", 2, dim=8, depth=1, heads=2, num_classes=2)
    with pytest.raises(ValueError, match=r"labels must be int64 .* one class in 0\.\.1 each"):
        program.labelled(labels)


def test_given_labels_need_a_network_with_classes():
    with pytest.raises(CapabilityError, match="the network knows no classes"):
        MaskedDiffusion.build("ab", 2, dim=8, depth=1, heads=2).labelled(torch.tensor(0))


conditional = pytest.mark.skipif(
    "given" not in inspect.signature(ReverseChain).parameters, reason="chains take no conditions"
)


@conditional
def test_given_labels_make_one_chain_of_a_batch(trained):
    """Its law at each label is that of the denoiser with this label filled in."""
    chain = trained.labelled(torch.tensor([1, 0])).chain(4)
    assert chain.batch_shape == (2,)
    paths = chain.sample((30,), generator=torch.Generator().manual_seed(0))
    assert paths.shape == (30, 2, 5, 2)
    found = chain.log_prob(paths.clone())
    for column, label in enumerate((1, 0)):
        kernel = InterpolatingKernel(trained.process, trained.labelled(label), num_steps=4)
        alone = ReverseChain(kernel, trained.length).log_prob(paths[:, column])
        torch.testing.assert_close(found[:, column], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(found[:, 1], chain.log_prob(paths.flip(1))[:, 0])


@conditional
def test_programs_of_several_labels_share_one_denoiser(trained):
    first, other = (trained.labelled(torch.tensor(label)) for label in (0, 1))
    assert first.denoiser is other.denoiser is first.labelled(torch.tensor([1, 1])).denoiser
    assert first.chain(4).kernel.same_as(other.chain(4).kernel)
    assert isinstance(trained.denoiser, Transformer)
    assert trained.chain(4).batch_shape == ()


@conditional
def test_a_label_may_be_drawn_in_a_program(trained):
    def model():
        with pyro.plate("n", 5):
            label = pyro.sample("label", Categorical(torch.tensor([0.5, 0.5])))
            chain = trained.labelled(label).chain(4)
            return chain.x0(pyro.sample("path", chain))

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["_RETURN"]["value"].shape == (5, 2)
    assert bool(trace.log_prob_sum().isfinite())


@conditional
def test_bounds_are_those_of_the_given_labels(trained):
    rows, labels = torch.tensor([[0, 1], [1, 1], [0, 0]]), torch.tensor([0, 1, 1])

    def bound(program, rows):
        generator = torch.Generator().manual_seed(0)
        return program.bound_terms(rows, num_times=3, generator=generator)

    found = bound(trained.labelled(labels), rows)
    alone = [bound(trained.labelled(torch.full((3,), label)), rows) for label in (0, 1)]
    expected = torch.where(labels == 1, alone[1], alone[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, bound(trained, rows))


def test_the_prior_of_a_class_by_name(tmp_path):
    """Guidance 1 is the conditional network, and above 1 its odds grow by the power."""
    torch.manual_seed(0)
    law = {"lengths": [0.0, 0.5, 0.5], "classes": ("low", "high")}
    shape = {"dim": 8, "depth": 1, "heads": 2, "num_classes": 2}
    program = MaskedDiffusion.build("ab_", 2, name="named", **law, **shape).eval()
    torch.nn.init.normal_(program.denoiser.vocabulary.weight)
    torch.nn.init.normal_(program.denoiser.label.weight, std=3.0)
    program.save(tmp_path)
    program = load(tmp_path)
    assert program.classes == ("low", "high")
    states = torch.tensor([[3, 3], [3, 2]])
    high = program.of_class("high")
    torch.testing.assert_close(high.denoiser(states, 0.5), program.denoiser(states, 0.5, label=1))
    both = [program.denoiser(states, 0.5, label=y).double() for y in (1, 2)]
    guided = program.of_class(1, 3.0).denoiser(states, 0.5)
    odds = [rows[..., 0] - rows[..., 1] for rows in (guided, *both)]
    torch.testing.assert_close(odds[0], 3 * odds[1] - 2 * odds[2], rtol=0, atol=1e-4)
    path = program.of_class("high", 2.0).chain(2).sample((50,))
    texts = program.decode(path[:, -1])
    assert {len(text) for text in texts} == {1, 2}
    assert high.chain(2).kernel.changes == ("label 1",)
    with pytest.raises(ValueError) as caught:
        program.of_class("middle")
    assert str(caught.value) == "named: there is no class 'middle'; choose one of low, high."
    with pytest.raises(CapabilityError):
        MaskedDiffusion.build("ab", 2, dim=8, depth=1, heads=2).of_class("high")
