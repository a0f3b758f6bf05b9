"""Latents that move inside SMC: unbiased evidence, and wrong versions that must be found out.

All numbers are held to a grid (4 standard errors: false alarm 6e-5 each) on program E, ``N = 4``,
where a wrong kernel shows most. Means are tested before they are normalised: afterwards they are
biased by ``1 / N`` anyway.
"""

import pytest
import torch

from ppl_diffusion.inference import SMC, LatentMoves
from ppl_diffusion.inference import latent_moves as kernels
from ppl_diffusion.inference.latent_run import LatentRun
from ppl_diffusion.inference.latent_sites import Coordinates, latent_sites
from ppl_diffusion.inference.scout import LatentMover, Tuned
from ppl_diffusion.programs import sources
from ppl_diffusion.programs.ahead import Levels
from ppl_diffusion.smc.twists import FILL_UNIFORMS, Defensive, PersistentFill
from ppl_diffusion.testing.oracles import z_score
from tests.helpers.program_e import assay, truth

RUNS = 20_000
SPREAD = torch.diag(torch.tensor([0.12, 0.2], dtype=torch.float64)).sqrt()[None]


class Frozen(SMC):
    """The runner with moves that nobody tuned: at every step, with known covariance and floor."""

    number = 3

    def _latent_moves(self, run):
        move = kernels.RealMove("random-walk", SPREAD)
        known = {k: Tuned(move, self.number) for k in (1, 2, 3)}
        log_c = {k: torch.full((1, 1), truth()[0], dtype=torch.float64) for k in range(4)}
        run.levels = Levels(tempered=False, learning=False, log_c=log_c)
        return LatentRun(LatentMover(LatentMoves(), latent_sites(run.program), known), left={})


@pytest.fixture(autouse=True)
def large_batches(monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROWS", 2**17)


def scores(posterior):
    """Return how far evidence and unnormalised mean are from the truth, in standard errors."""
    log_z, (gain, _) = truth()
    estimate = (posterior.log_evidence - log_z).exp()
    means = posterior.expectation(lambda s: s["gain"])
    return z_score(estimate, 1.0), z_score(estimate * (means - gain), 0.0)


def frozen(num_runs=RUNS, twist=None, particles=4):
    twist = twist or Defensive(0, 0.3)
    return Frozen(assay, num_particles=particles, num_runs=num_runs, twist=twist, store_path=False)


def test_moves_chosen_before_the_run_leave_the_evidence_unbiased():
    assert all(abs(z) < 4 for z in scores(frozen(RUNS // 2).run(seed=1)))


def test_persistent_completions_are_moved_under_too():
    posterior = frozen(8000, PersistentFill(2, 0.2)).run(seed=2)
    assert all(abs(z) < 4 for z in scores(posterior))


def forget_the_volume(monkeypatch):
    back = Coordinates.back

    def without(self, flat, latents):
        moved, volume = back(self, flat, latents)
        return moved, torch.zeros_like(volume)

    monkeypatch.setattr(Coordinates, "back", without)


def forget_the_look_ahead(monkeypatch):
    monkeypatch.setattr(kernels.Spot, "level", property(lambda spot: spot.log_r))


def keep_the_old_look_ahead(monkeypatch):
    renew = LatentMover.renew

    def kept(self, method, run, state, log_h, group, generator):
        state, _ = renew(self, method, run, state, log_h, group, generator)
        return state, log_h

    monkeypatch.setattr(LatentMover, "renew", kept)


def complete_anew_after_the_move(monkeypatch):
    renew = LatentMover.renew

    def anew(self, method, run, state, log_h, group, generator):
        state, log_h = renew(self, method, run, state, log_h, group, generator)
        if group == 0:
            return state, log_h
        carry = state["sites"]["path"]
        noise = torch.rand_like(carry[FILL_UNIFORMS])
        state = {**state, "sites": {"path": {**carry, FILL_UNIFORMS: noise}}}
        return state, method.look(run, state, group, generator)

    monkeypatch.setattr(LatentMover, "renew", anew)


WRONG = [
    forget_the_volume,
    forget_the_look_ahead,
    keep_the_old_look_ahead,
    complete_anew_after_the_move,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_move_is_found_out(wrong, monkeypatch):
    wrong(monkeypatch)
    persistent = PersistentFill(1, 0.2) if wrong is complete_anew_after_the_move else None
    posterior = frozen(2000, persistent, particles=32).run(seed=3)
    assert max(abs(z) for z in scores(posterior)) > 8


def tuned(num_runs=RUNS, seed=4, particles=4, **options):
    options = {"twist": Defensive(0, 0.3), "store_path": False, **options}
    return SMC(assay, num_particles=particles, num_runs=num_runs, **options).run(seed=seed)


def test_a_scout_leaves_the_evidence_unbiased(monkeypatch):
    monkeypatch.setattr("ppl_diffusion.inference.latent_run.few", lambda size, resampler: 32)
    assert all(abs(z) < 4 for z in scores(tuned(RUNS // 2)))


def test_kernels_tuned_on_the_particles_they_move_are_found_out():
    moves = LatentMoves(tuning="own", tempering=False)
    posterior = tuned(moves=moves)
    assert scores(posterior)[0] < -15
    assert posterior.settings["latent_moves"]["evidence"] == "consistent, not unbiased"


METHODS = {
    "steering": ("steering", {}, [1, 2, 3]),
    "steering-strided": ("steering", {"every": 2}, [1, 3]),
    "steering-max": ("steering", {"kind": "max", "twist": "persistent"}, [3]),
    "soft-value": ("soft-value", {"num_children": 3}, [1, 2, 3]),
    "twisted": ("twisted", {}, [1, 2, 3]),
    "twisted-surprise": ("twisted", {"surprise": True}, [1, 2, 3]),
    "twisted-top": ("twisted", {"top": 2}, [3]),
    "reweighted": ("twisted", {"proposal": "reweighted"}, [1, 2, 3]),
    "corrector": ("corrector", {}, [1, 2, 3]),
    "corrector-clamped": ("corrector", {"clamp": True}, [1, 2, 3]),
    "skipping": ("smc", {"twist_every": 2}, [2, 3]),
    "hmc": ("smc", {"moves": LatentMoves(kernel="hmc", number=2)}, [1, 2, 3]),
    "blind": ("smc", {"twist": None}, [3]),
    "importance": ("importance-sampling", {"ess_threshold": 0.0}, [3]),
    "lineages": ("guided-lineages", {"ess_threshold": 0.0}, [3]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_that_carry_latents_move_them(name):
    method, options, schedule = METHODS[name]
    options = {"ess_threshold": 2.0, "method": method, **options}
    posterior = SMC(assay, num_particles=8, num_runs=3000, **options).run(seed=5)
    assert posterior.settings["latent_moves"]["schedule"] == schedule
    assert all(abs(z) < 4 for z in scores(posterior))


def test_tempering_moves_latents_at_every_stage():
    options = {"num_particles": 8, "num_runs": 1000, "powers": [0.0, 0.2, 0.5, 1.0]}
    posterior = SMC(assay, method="tempering", **options).run(seed=3)
    assert posterior.settings["latent_moves"]["schedule"] == [1, 2, 3]
    assert all(abs(z) < 4 for z in scores(posterior))


def test_the_end_is_resampled_and_the_evidence_stays(tmp_path):
    options = {"twist": None, "num_particles": 32, "num_runs": 4}
    posterior = SMC(assay, **options).run(seed=0)
    low = posterior.ess[:, -1] < 16
    assert bool(low.any())
    assert bool((posterior.resampled[:, -1] == low).all())
    assert torch.allclose(posterior.log_weights[low].exp(), torch.tensor(1 / 32).double())
    assert bool((posterior.path[..., -1, :] == posterior.x0).all())
    assert all(len(run.unique()) > 16 for run in posterior.samples["gain"][low])
    running = posterior.log_evidence_steps[:, -1]
    assert torch.equal(running, posterior.log_evidence)
    posterior.save(tmp_path)
    again = type(posterior).load(tmp_path)
    assert again.settings["latent_moves"] == posterior.settings["latent_moves"]
    assert "not before" in again.settings["latent_moves"]["note"]


def test_refined_runs_move_their_latents_last():
    """Before the path moves, no more values would be left than there are heads."""
    size = {"num_chains": 2, "num_sweeps": 2, "num_particles": 16, "num_runs": 400}
    posterior = SMC(assay, method="refinement", **size).run(seed=0)
    assert all(abs(z) < 4 for z in scores(posterior))
    assert all(len(run.unique()) >= 8 for run in posterior.samples["gain"])


def test_kernels_tuned_on_themselves_are_said_in_the_law():
    size = {"num_particles": 8, "num_runs": 1}
    own = SMC(assay, moves=LatentMoves(tuning="own"), **size).run(seed=0)
    assert own.law.exact
    assert "consistent, not unbiased" in str(own.law)
    assert "unbiased" not in str(SMC(assay, **size).run(seed=0).law)
