"""Measurements: what is known, as files, potentials, and sites of programs."""

import math

import numpy as np
import pyro
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.imaging.codec_error import CodecError, MeasuredWithError
from ppl_diffusion.imaging.measurement import Measurement, measure
from ppl_diffusion.imaging.operators import Operator, make_operator
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.programs.sources import as_potential
from ppl_diffusion.smc.law import Tilt
from ppl_diffusion.testing import PotentialContract
from ppl_diffusion.testing.anchored_toys import measured_toy

SHAPE = (1, 8, 8)
NAMES = ("sr4", "gblur", "mblur", "rinp", "box", "hdr", "nlblur", "phase")


class Blocks:
    """A codec of four tokens: each paints a quarter of the image grey."""

    codebook = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])

    def decode_embedded(self, embeddings):
        grey = torch.tanh(embeddings @ torch.tensor([0.6, 0.2])).unflatten(-1, (1, 2, 2))
        return grey.repeat_interleave(4, -2).repeat_interleave(4, -1)

    def decode(self, tokens):
        return self.decode_embedded(self.codebook[tokens])


def image(seed=0):
    return 2 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) - 1


def measured(name="sr4", sigma=0.1, seed=0):
    return measure(make_operator(name, SHAPE, seed=seed), image(), sigma, seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_all_of_it(name, tmp_path):
    measurement = measured(name, seed=3)
    measurement.save(tmp_path / "m.npz")
    again = Measurement.load(tmp_path / "m.npz")
    assert again.operator == measurement.operator
    assert torch.equal(again.y, measurement.y)
    assert again.sigma == measurement.sigma
    assert torch.equal(again.residual(image(1)), measurement.residual(image(1)))


def test_noise_comes_from_its_seed_and_has_its_size():
    operator, u = make_operator("hdr", SHAPE), image()
    first, same, other = (measure(operator, u, 0.1, s) for s in (5, 5, 6))
    assert torch.equal(first.y, same.y)
    assert not torch.equal(first.y, other.y)
    noise = torch.stack([measure(operator, u, 0.1, s).y - operator(u) for s in range(200)])
    # 12800 numbers: four standard errors, 6e-5 false alarms.
    assert abs(float(noise.square().mean()) / 0.01 - 1) < 4 * math.sqrt(2 / noise.numel())


def test_noise_is_not_what_the_operator_was_drawn_from():
    class Drawn(Operator):
        name = "drawn"

        @classmethod
        def draw_parameters(cls, image_shape, rng):
            return {"normal": torch.from_numpy(rng.standard_normal(64))}

        def measure(self, images):
            return images

        invert = measure

    operator, u = Drawn.draw(SHAPE, seed=4), image().double()
    noise = measure(operator, u, 1.0, 4).y - u.flatten()
    pair = torch.stack([noise, operator.parameters["normal"]])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.5  # 4 / sqrt(64)


def test_the_residual_of_the_truth_is_about_one():
    residuals = [float(measured("gblur", seed=s).residual(image())) for s in range(100)]
    assert abs(np.mean(residuals) - 1) < 4 * math.sqrt(2 / (64 * 100))


def test_the_likelihood_is_that_of_independent_gaussians():
    measurement, u = measured("gblur", sigma=0.2), image(1).expand(3, 2, *SHAPE)
    error = measurement.y - measurement.operator(u)
    expected = -error.square().sum(-1) / 0.08 - 64 * math.log(0.2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(measurement.log_likelihood(u), expected)
    assert measurement.likelihood(u).batch_shape == (3, 2)
    assert measurement.likelihood(u).event_shape == (64,)
    torch.testing.assert_close(measurement.residual(u), error.square().mean(-1) / 0.04)


def test_the_potential_is_the_likelihood_of_decoded_tokens():
    measurement, codec = measured("nlblur"), Blocks()
    tokens = torch.randint(4, (5, 4), generator=torch.Generator().manual_seed(0))
    potential = measurement.potential(codec)
    assert not potential.linear
    expected = measurement.log_likelihood(codec.decode(tokens))
    torch.testing.assert_close(potential(tokens), expected.double(), rtol=1e-6, atol=1e-3)
    embeddings = codec.codebook[tokens].clone().requires_grad_()
    potential.embedded(embeddings).sum().backward()
    assert bool(embeddings.grad.abs().sum((-2, -1)).gt(0).all())


def test_a_program_observes_it():
    measurement, codec = measured(), Blocks()
    tokens = torch.tensor([0, 1, 2, 3])

    def program():
        pyro.sample("y", measurement.likelihood(codec.decode(tokens)), obs=measurement.y)

    trace = pyro.poutine.trace(program).get_trace()
    expected = measurement.potential(codec)(tokens)
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected), rel=1e-5)


class TestTheContract(PotentialContract):
    tolerance = 1e-4

    def make_potential(self):
        return measured().potential(Blocks())

    def make_sequences(self):
        return torch.randint(4, (16, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_noise_without_a_size_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma, the noise, must be positive"):
        Measurement(make_operator("hdr", SHAPE), torch.zeros(64), sigma)


@pytest.mark.parametrize("y", [torch.zeros(3), torch.full((64,), math.nan), torch.zeros(1, 64)])
def test_data_of_another_operator_are_refused(y):
    with pytest.raises(ValueError, match=r"hdr measures 64 numbers, got|64 of the 64"):
        Measurement(make_operator("hdr", SHAPE), y, 0.1)


def test_files_of_other_things_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no measurement"):
        Measurement.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "other.npz", "array.npy"):
        with pytest.raises(ValueError, match="holds no measurement"):
            Measurement.load(tmp_path / name)
    entries = {"image_shape": SHAPE, "y": np.zeros(64), "sigma": 0.1}
    np.savez(tmp_path / "unknown.npz", operator="mine", **entries)
    with pytest.raises(ValueError, match="'mine', which is not known here"):
        Measurement.load(tmp_path / "unknown.npz")


def test_a_file_never_runs_code(tmp_path):
    np.savez(tmp_path / "m.npz", operator="hdr", y=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="holds no measurement"):
        Measurement.load(tmp_path / "m.npz")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parameter_kernel": None}, "KeyError: 'kernel'"),
        ({"parameter_kernel": np.zeros((3, 4))}, "no measurement"),
        ({"sigma": "abc"}, "could not convert string to float"),
        ({"y": np.full(64, np.nan)}, "64 of the 64 numbers of mblur are not finite"),
        ({"y": np.zeros(63)}, "mblur measures 64 numbers"),
        ({"image_shape": np.array(8)}, "no measurement"),
    ],
)
def test_a_damaged_file_is_one_sentence(change, text, tmp_path):
    measure(make_operator("mblur", SHAPE), torch.zeros(SHAPE), 0.1).save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as archive:
        entries = {**archive, **change}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in entries.items() if v is not None})
    with pytest.raises(ValueError, match=r"bad\.npz") as refused:
        Measurement.load(tmp_path / "bad.npz")
    assert text in str(refused.value)
    assert "give one that a restoration" in str(refused.value)


def test_laws_tell_measurements_apart():
    """By data, noise and error of the codec; their names are the same."""
    error = CodecError(torch.zeros(64), 0.1 * torch.eye(64)[:, :2], torch.full((64,), 0.01))

    def tilt(task="sr4", sigma=0.1, grey=0.0, *, known=False):
        seen = measure(make_operator(task, SHAPE), torch.full(SHAPE, grey), sigma)
        model = MeasuredWithError(seen, error) if known else seen
        return Tilt.by(0.5 * model.potential(Blocks()))

    for known in (False, True):
        first = tilt(known=known)
        assert first == tilt(known=known)
        others = [
            tilt(grey=0.5, known=known),
            tilt(sigma=0.2, known=known),
            tilt("sr2", known=known),
        ]
        assert len({first, *others}) == 4
    assert tilt() != tilt(known=True)


def test_results_of_other_data_have_another_law():
    runs = []
    for seed in (0, 0, 1):
        toy = measured_toy(seed)
        chain = ReverseChain(InterpolatingKernel(toy.process, toy.denoiser, num_steps=2), 4)
        runs.append(SMC(chain, toy.potential, num_particles=4).run(seed=0))
    assert runs[0].law == runs[1].law
    assert runs[0].law != runs[2].law
    assert runs[0].target == runs[2].target


def test_a_measurement_given_for_its_potential_is_told_so():
    seen = measure(make_operator("sr4", SHAPE), torch.zeros(SHAPE), 0.1)
    with pytest.raises(TypeError, match=r"got Measurement; its \.potential\(codec\) is one"):
        as_potential(seen)
