"""The job and the Pyro program that says the same thing have the same target."""

import pyro
import pytest
import torch

from ppl_diffusion.designs.brief import job_of
from ppl_diffusion.designs.program import build_target
from ppl_diffusion.designs.question import Job, Question
from ppl_diffusion.designs.reward_spec import RewardSpec
from ppl_diffusion.designs.run import design
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC, methods
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.models import MaskedDiffusion, load_oracle
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
    motif = RewardSpec("m", "motif", f"{matrices}@M2", weight=0.5)
    question = Question(gc=(0.25, 0.5), rewards=(motif,), fix=((3, "TA"),))
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
    motif = RewardSpec("m", "motif", f"{matrices}@M2", weight=0.5)
    question = Question(gc=(0.1, 0.9), rewards=(motif,), fix=((3, "TA"),))
    search = Search(num_particles=16, num_runs=2, num_steps=LENGTH, method=method)
    target = build_target(Job(prior[1], question, search))
    with DeviceDiscipline():
        design(target)


def test_the_shipped_brief_says_everything_about_its_oracles():
    job = job_of("yeast-promoter")
    (reward,), (judge,) = job.question.rewards, job.question.judges
    assert (reward.at, reward.temperature, reward.at_most) == ("yeast-oracle-design", 0.4, 17.0)
    assert judge.at == "yeast-oracle-judge"
    target = build_target(job)
    x0 = target.prior.encode(["ACGT" * 20, "T" * 80])
    oracle = load_oracle("yeast-oracle-design")
    wanted = oracle(x0).clamp_max(17.0).double() / 0.4
    torch.testing.assert_close(target.potential(x0), wanted)


def test_nothing_asked_is_refused(prior):
    with pytest.raises(InputError, match="Nothing is asked of"):
        build_target(Job(prior[1]))


def test_an_oracle_of_bases_needs_bases(tmp_path):
    program = MaskedDiffusion.build(list("ab"), 4, name="letters", dim=16, depth=1, heads=2)
    program.save(tmp_path / "letters")
    spec = RewardSpec("e", "oracle", "yeast-oracle-design")
    with pytest.raises(InputError, match="reads the bases ACGT of sequences of one length, and th"):
        build_target(Job(str(tmp_path / "letters"), Question(rewards=(spec,))))


def test_any_letters_are_designed(tmp_path):
    program = MaskedDiffusion.build(list("ab"), 4, name="letters", dim=16, depth=1, heads=2)
    program.save(tmp_path / "letters")
    question = Question(fix=((1, "b"),), forbid=("aa",))
    search = Search(method="smc", num_particles=32, num_runs=2, num_steps=4)
    result = design(build_target(Job(str(tmp_path / "letters"), question, search)))
    assert all(text[1] == "b" and "aa" not in text for text in result.sequences)


def test_sequences_of_several_lengths_are_designed(tmp_path):
    law = [0.0, 0.25, 0.25, 0.25, 0.25]
    options = {"name": "short", "lengths": law, "dim": 16, "depth": 1, "heads": 2}
    MaskedDiffusion.build(list("ACGT_"), 4, **options).save(tmp_path / "short")
    question = Question(fix=((1, "G"),), gc=(0.5, 1.0), forbid=("CC",))
    search = Search(method="smc", num_particles=64, num_runs=2, num_steps=4)
    result = design(build_target(Job(str(tmp_path / "short"), question, search)))
    assert {len(text) for text in result.sequences} == {2, 3, 4}
    assert all(text[1] == "G" and "CC" not in text for text in result.sequences)
    assert all(sum(map(text.count, "GC")) >= len(text) / 2 for text in result.sequences)
    with pytest.raises(InputError, match="no sequence has 7 to 9 letters"):
        build_target(Job(str(tmp_path / "short"), Question(gc=(0, 1), lengths=(7, 9)), search))


def test_a_brief_of_another_network_is_refused(prior):
    with pytest.raises(InputError, match="is not the one of the brief"):
        build_target(Job(prior[1], Question(gc=(0.0, 1.0)), prior_digest="0123"))
