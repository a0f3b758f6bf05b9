"""The job and the Pyro program that says the same thing have the same target."""

import pyro
import pytest
import torch

from ppl_diffusion.designs.program import build_target
from ppl_diffusion.designs.question import InputError, Job, MotifSpec, Question, Search
from ppl_diffusion.designs.run import design
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC, methods
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import GCContent, find_motif, read_motifs
from ppl_diffusion.potentials.factor import factor
from ppl_diffusion.testing.devices import DeviceDiscipline

LENGTH = 12
MATRICES = """\
>M1 first
A [ 9 0 0 ]
C [ 0 9 0 ]
G [ 0 0 9 ]
T [ 0 0 0 ]
>M2 second
A [ 0 0 0 ]
C [ 5 5 0 ]
G [ 5 5 0 ]
T [ 0 0 9 ]
"""


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        program = MaskedDiffusion.build(list("ACGT"), LENGTH, name="tiny", dim=16, depth=1, heads=2)
    program.save(folder)
    return program, str(folder)


@pytest.fixture
def matrices(tmp_path):
    path = tmp_path / "m.jaspar"
    path.write_text(MATRICES)
    return path


def test_job_and_program_have_the_same_target(prior, matrices):
    program, folder = prior
    question = Question(gc=(0.25, 0.5), motifs=(MotifSpec(matrices, "M2", 0.5),), fix=((3, "TA"),))
    numbers = {"num_particles": 128, "num_runs": 16, "num_steps": 6}
    search = Search(method="smc", options={"twist": "none"}, **numbers)
    result = design(build_target(Job(folder, question, search)))
    gc, motif = GCContent(0.25, 0.5), 0.5 * find_motif(read_motifs(matrices), "M2").potential()

    def same():
        x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)))
        factor("gc", gc, x)
        pyro.factor("motif", motif(x))

    chain = program.chain(num_steps=6)
    tokens = program.encode("AAATAAAAAAAA")
    mask = torch.isin(torch.arange(LENGTH), torch.tensor([3, 4]))
    other = SMC(clamp(same, tokens=tokens, mask=mask), num_particles=128, num_runs=16, twist=None)
    other = other.run(seed=1)

    x0 = result.posterior.x0
    torch.testing.assert_close(result.posterior.log_potential, gc(x0) + motif(x0))
    # Two independent estimates of one evidence: 4 standard errors, false alarm about 1 in 10,000.
    ratio = (result.posterior.log_evidence - other.pooled_log_evidence).exp()
    error = (ratio.var() + (other.log_evidence - other.pooled_log_evidence).exp().var()).sqrt()
    assert abs(float(ratio.mean()) - 1) < 4 * float(error) / 16**0.5
    assert float(error) < 1.0  # the comparison has power


@pytest.mark.parametrize("method", [n for n, cls in methods().items() if cls.needs.any_target])
def test_a_run_says_where_its_tensors_live(prior, matrices, method):
    """With everything asked for, so that each part of a design meets the device of its prior."""
    question = Question(gc=(0.1, 0.9), motifs=(MotifSpec(matrices, "M2", 0.5),), fix=((3, "TA"),))
    search = Search(num_particles=16, num_runs=2, num_steps=LENGTH, method=method)
    target = build_target(Job(prior[1], question, search))
    with DeviceDiscipline():
        design(target)


def test_without_a_question_about_expression_the_default_is_filled_in(prior, monkeypatch):
    from ppl_diffusion.designs import program as module

    class Counter:
        """Count the A's."""

        def __call__(self, tokens):
            return (tokens == 0).sum(-1).to(torch.float32)

        def to(self, device):
            return self

    monkeypatch.setitem(module.ORACLES, "tiny", ("design", "judge"))
    monkeypatch.setattr(module, "load_oracle", lambda name: Counter())
    target = build_target(Job(prior[1]))
    assert target.job.question.temperature == module.DEFAULT_TEMPERATURE
    x0 = torch.zeros(2, LENGTH, dtype=torch.int64)
    torch.testing.assert_close(
        target.potentials["expression"](x0),
        torch.full((2,), LENGTH / module.DEFAULT_TEMPERATURE, dtype=torch.float64),
    )
    with pytest.raises(InputError, match="Nothing is asked of"):
        build_target(Job(prior[1], Question(expression=False)))


def test_a_prior_over_other_letters_is_refused(tmp_path):
    program = MaskedDiffusion.build(list("ab"), 4, name="letters", dim=16, depth=1, heads=2)
    program.save(tmp_path / "letters")
    with pytest.raises(InputError, match="Designs are made of the bases ACGT"):
        build_target(Job(str(tmp_path / "letters"), Question(gc=(0.0, 1.0))))
