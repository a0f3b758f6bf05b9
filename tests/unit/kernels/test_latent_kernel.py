"""The contract of kernels on chains of tokens and a latent, and what they refuse."""

import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, LatentKernel, Path, Uniform
from ppl_diffusion.kernels.latent_solvers import DDIM, Ancestral, DPMSolver
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import KernelContract
from ppl_diffusion.testing.latent_toys import corr_bits, random_latents

BITS = Absorbing(2)
CODES = corr_bits(0.2)
NOISE = Gaussian("linear", t_min=0.2)
VECTORS = CODES.embedded(lambda x: 2.0 * x[:, :1, None] - 1.0)


def of_codes(path):
    return LatentKernel(BITS, BITS, CODES.denoiser(), path)


def of_vectors(path, solver=None):
    return LatentKernel(BITS, NOISE, VECTORS.denoiser(NOISE), path, solver=solver)


class CodeContract(KernelContract):
    def block_grid(self, name):
        return torch.arange(3)[:, None], torch.ones(3, dtype=torch.float64)


class TestAtOnce(CodeContract):
    def make_kernel(self):
        return of_codes(Path.joint(2))


class TestCodeFirst(CodeContract):
    def make_kernel(self):
        return of_codes(Path.sequential(1, 2))


class TestTokensAlone(CodeContract):
    def make_kernel(self):
        return of_codes(Path.masked(2))


class TestVectorAtOnce(KernelContract):
    tolerance = 1e-6

    def make_kernel(self):
        return of_vectors(Path.joint(1))

    def block_grid(self, name):
        points = torch.linspace(-7.0, 7.0, 57, dtype=torch.float64)
        return points[:, None, None], torch.full((57,), 0.25, dtype=torch.float64)


def zero(x0):
    return torch.zeros(x0.shape[:-1], dtype=torch.float64)


@pytest.mark.parametrize("solver", [DDIM(), DPMSolver(2)])
def test_a_latent_without_noise_is_refused_where_particles_are_copied(solver):
    chain = ReverseChain(of_vectors(Path.sequential(2, 1), solver), 2)
    assert chain.kernel.capability == "SAMPLE_ONLY"
    assert chain.sample((3,)).shape == (3, 4, 3)
    with pytest.raises(CapabilityError, match="never part again; take a solver with noise"):
        FeynmanKac(chain, zero)
    with pytest.raises(CapabilityError, match="never part again"):
        SMC(chain, zero, num_particles=4).run(seed=0)


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(eta=0.5), DPMSolver(2, sde=True)])
def test_a_latent_with_noise_runs(solver):
    chain = ReverseChain(of_vectors(Path.sequential(3, 1), solver), 2)
    posterior = run_smc(FeynmanKac(chain, zero), num_particles=8, num_runs=2)
    assert posterior.samples["latent"].shape == (2, 8, 1, 1)
    torch.testing.assert_close(posterior.log_evidence, torch.zeros(2, dtype=torch.float64))
    path = posterior.path
    assert torch.equal(chain.x0(path), posterior.x0)
    assert torch.equal(chain.latent(path), posterior.samples["latent"])
    torch.testing.assert_close(chain.log_prob(path).isfinite().all(), torch.tensor(True))


def test_a_path_without_the_latent_needs_no_noise():
    kernel = of_vectors(Path.masked(2), DDIM())
    assert kernel.parts
    assert kernel.capability == "FACTORISED"


def test_what_moves_where():
    kernel = of_codes(Path([(1, 1), (1, 0), (0.5, 0), (0, 0)]))
    assert [kernel.moved(k) for k in range(3)] == [{"latent"}, {"tokens"}, {"tokens"}]
    assert kernel.same_as(of_codes(kernel.path)) is False  # another denoiser
    same = LatentKernel(BITS, BITS, kernel.denoiser, Path.sequential(1, 2))
    assert kernel.same_as(same)
    assert not kernel.same_as(LatentKernel(BITS, BITS, kernel.denoiser, Path.joint(3)))


def test_no_token_and_no_slot_stays_hidden():
    for path in (Path.joint(2), Path.ordered(2), Path.led(3, 1), Path.sequential(2, 2)):
        chain = ReverseChain(of_codes(path), 2)
        drawn = chain.sample((200,))
        assert int(chain.x0(drawn).max()) < 2
        assert int(chain.latent(drawn).max()) < 2


def test_a_prompt_is_read_while_the_code_is_drawn():
    """P(c = 0 | x1 = 0) = .8; exact: the code is the first step. False alarm 6e-5."""
    chain = ReverseChain(of_codes(Path.sequential(1, 1)), 2, prompt=torch.tensor([0, -1]))
    code = chain.latent(chain.sample((4000,)))[:, 0]
    assert abs(float((code == 0).double().mean()) - 0.8) < 4 * (0.16 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((Uniform(2), BITS, CODES.denoiser(), Path.joint(2)), "the tokens must be masked"),
        ((BITS, NOISE, CODES.denoiser(), Path.joint(2)), "predicts 1 codes of 2, which Gaussian"),
        ((BITS, BITS, VECTORS.denoiser(NOISE), Path.joint(2)), "predicts 1 vectors of 1, which"),
        ((BITS, Absorbing(3), CODES.denoiser(), Path.joint(2)), "has 2 codes, the process 3"),
        ((BITS, BITS, CODES.denoiser(), [(1, 1), (0, 0)]), "path must be a Path, got list"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, sentence):
    with pytest.raises((CapabilityError, TypeError), match=sentence):
        LatentKernel(*arguments)


def test_a_solver_for_codes_is_refused():
    with pytest.raises(TypeError, match="codes are drawn, not solved for"):
        LatentKernel(BITS, BITS, CODES.denoiser(), Path.joint(2), solver=DDIM())


@pytest.mark.parametrize(
    "path",
    [Path([(1, 1), (1, 0.6), (0.5, 0.6), (0.5, 0.3), (0, 0)]), Path.joint(12)],
    ids=["tokens between", "both at once"],
)
def test_a_multistep_solver_begins_anew_where_tokens_have_moved(path):
    """The prediction jumps there: the next step has the law of order one, to the last bit."""
    second, first = (of_vectors(path, DPMSolver(n, sde=True)) for n in (2, 1))
    carry = second.init_carry((3,), 2, generator=torch.Generator().manual_seed(1))
    alike = first.resume({name: carry[name] for name in ("tokens", "latent")})
    torch.manual_seed(2)
    for k in range(path.num_steps):
        step, other = second.step(carry, k), first.step(alike, k)
        value = step.sample()
        torch.testing.assert_close(step.log_prob(value), other.log_prob(value), rtol=0, atol=0)
        carry = second.advance(carry, value, k, step=step)
        alike = first.advance(alike, value, k, step=other)


def test_a_multistep_solver_goes_on_where_they_have_not():
    """Without tokens in between the second step of order two is another one."""
    second, first = (of_vectors(Path.sequential(12, 1), DPMSolver(n, sde=True)) for n in (2, 1))
    carry = second.init_carry((3,), 2, generator=torch.Generator().manual_seed(1))
    alike = first.resume({name: carry[name] for name in ("tokens", "latent")})
    torch.manual_seed(2)
    for k in range(2):
        step, other = second.step(carry, k), first.step(alike, k)
        value = step.sample()
        carry = second.advance(carry, value, k, step=step)
        alike = first.advance(alike, value, k, step=other)
    assert not torch.equal(step.log_prob(value), other.log_prob(value))


def test_known_slots_are_certain_in_a_guess():
    problem = random_latents(2, 2, 2, 2, seed=5)
    kernel = LatentKernel(BITS, BITS, problem.denoiser(), Path.sequential(2, 1))
    carry = kernel.resume({"tokens": torch.full((2,), 2), "latent": torch.tensor([0, 2])})
    other = kernel.resume({"tokens": torch.full((2,), 2), "latent": torch.tensor([1, 2])})
    assert int(kernel.guess(carry, 1)["latent"][0]) == 0
    assert int(kernel.guess(other, 1)["latent"][0]) == 1
    assert int(kernel.guess(carry, 1)["latent"].max()) < 2


class Broken:
    """A network whose latent head is spoilt."""

    def __init__(self, denoiser, spoil):
        vars(self).update({n: getattr(denoiser, n) for n in ("latent", "conditions", "vocab_size")})
        self.kind, self.time_free, self.joint, self.head = (
            "cavity",
            True,
            denoiser.joint,
            denoiser.head,
        )
        self.latent_head = lambda rows: spoil(denoiser.latent_head(rows))

    def __call__(self, tokens, t, **given):
        return self.head(self.joint(tokens, t, **given)[..., : tokens.shape[-1], :])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda rows: rows * float("nan"), "latent_head of Broken returned NaN"),
        (lambda rows: rows[..., :0], r"latent_head of Broken returned shape \(3, 1, 0\), expected"),
    ],
)
@pytest.mark.parametrize("noise", [BITS, NOISE], ids=["codes", "vectors"])
def test_a_latent_that_is_no_number_is_refused(noise, spoil, sentence):
    problem = CODES if noise is BITS else VECTORS
    network = Broken(problem.denoiser(None if noise is BITS else noise), spoil)
    kernel = LatentKernel(BITS, noise, network, Path.sequential(1, 1))
    with pytest.raises(ValueError, match=sentence):
        ReverseChain(kernel, 2).sample((3,))
