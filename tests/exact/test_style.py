"""Style as a target: what anchored particles weigh is ``p(x) exp(-style / T)``, by enumeration."""

import math

import pytest
import torch

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.imaging import ImageClassifier, ImageCodec, StyleReward
from ppl_diffusion.imaging.classifier import ClassifierConfig
from ppl_diffusion.imaging.codec import CodecConfig
from ppl_diffusion.inference import SMC, QuantisedExpectation
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.testing.dense import all_states

INITIAL = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
TRANSITION = torch.full((4, 4), 0.1, dtype=torch.float64) + 0.6 * torch.eye(4).double()
TEMPERATURE = 0.01
RUNS, PARTICLES = 150, 32


@pytest.fixture(scope="module")
def problem():
    """Four tokens of 4 codes as an image of 8 x 8, random networks, and every sequence's law."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = ImageCodec(CodecConfig(8, 8, num_bits=2, features=4)).requires_grad_(False).eval()
        network = ImageClassifier(ClassifierConfig(8, 8, features=4)).requires_grad_(False).eval()
    for parameter in codec.decoder.parameters():  # random decoders say almost the same of all
        parameter.mul_(2.5)
    reference = codec.decode(torch.tensor([3, 3, 0, 1]))
    style = StyleReward(codec, network.features, reference, temperature=TEMPERATURE)
    states = all_states(4, 4)
    log_p = INITIAL.log()[states[:, 0]] + TRANSITION.log()[states[:, :-1], states[:, 1:]].sum(-1)
    log_g = -style.distance(codec.decode(states)).double() / TEMPERATURE
    process = Absorbing(4)
    kernel = OrderedKernel(process, MarkovDenoiser(INITIAL, TRANSITION, process), length=4)
    return ReverseChain(kernel, 4), style, states, log_p + log_g


def run(problem, variant, num_iterations=4):
    chain, style, *_ = problem
    return SMC(
        chain,
        style,
        method="aps-smc",
        variant=variant,
        expectation=QuantisedExpectation(num_iterations=num_iterations),
        num_particles=PARTICLES,
        num_runs=RUNS,
        store_path=False,
    ).run(seed=0)


@pytest.mark.parametrize("variant", ["policy", "values"])
def test_the_target_is_the_prior_times_the_tilt_of_style(problem, variant):
    """Mean evidence and mean style, four standard errors each: false alarms 1.3e-4 a test."""
    _, style, states, log_joint = problem
    posterior = run(problem, variant)
    assert posterior.exact
    ratio = (posterior.log_evidence - torch.logsumexp(log_joint, 0)).exp()
    error = float(ratio.std()) / math.sqrt(RUNS)
    assert error < 0.05
    assert abs(float(ratio.mean()) - 1.0) < 4 * error
    # E[Z_hat * sum w f] = Z E[f] has no bias, unlike each run's own average.
    values = style(posterior.x0)
    found = ratio * (posterior.log_weights.exp() * values).sum(-1)
    wanted = float((log_joint.softmax(0) * style(states)).sum())
    assert abs(float(found.mean()) - wanted) < 4 * float(found.std()) / math.sqrt(RUNS)


def test_the_tilt_matters(problem):
    """What the test above would not see without it: the prior alone has another style."""
    _, style, states, log_joint = problem
    tilted = float((log_joint.softmax(0) * style(states)).sum())
    log_p = log_joint - style(states)
    alone = float((log_p.exp() * style(states)).sum())
    assert tilted > alone + 0.5, "in nats, at this temperature"
    assert float(torch.logsumexp(log_p, 0)) == pytest.approx(0.0, abs=1e-6)
