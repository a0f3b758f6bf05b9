"""M4, M14, M18: what every program owes on one exact problem, beyond the mean of its evidence.

The problem and the programs are in ``conftest.py``. Evidences are held at four standard errors
(false alarm 6e-5 per number), 5 % for the file, once, at the fixed seeds.
"""

import pytest
import torch

from ppl_diffusion.testing import total_variation, z_score

MAX_Z = 4.0


def test_mean_log_evidence_lies_below_and_rises(posed):
    """M4, Jensen, at a steep potential: below by four standard errors at two particles.

    Neighbouring means are two to fifteen standard errors apart; most of the false alarms are here.
    """
    steep, means, errors = posed.again(power=2.0), [], []
    for particles, runs in ((2, 1000), (16, 600), (128, 250)):
        log_ratio = steep.ratio(steep.run(particles, runs)).log()
        means.append(float(log_ratio.mean()))
        errors.append(float(log_ratio.std()) / runs**0.5)
    assert means[0] < means[1] < means[2] < MAX_Z * errors[2]
    assert means[0] < -MAX_Z * errors[0]


def test_renamed_tokens_leave_the_law(posed):
    """M14: the same evidence to round-off, estimated from runs that never saw the old names."""
    renamed = posed.renamed()
    assert renamed.law.log_z == pytest.approx(posed.law.log_z, abs=1e-12)
    torch.testing.assert_close(renamed.x0_law.flip(0), posed.x0_law, rtol=0, atol=1e-12)
    posterior = renamed.run(8, 600)
    assert max(map(abs, renamed.scores(posterior))) < MAX_Z
    law = renamed.mixed_law(renamed.run(128, 100))
    assert total_variation(law, renamed.x0_law) < 0.05 < total_variation(law, posed.x0_law)


def test_a_wrong_denoiser_has_the_evidence_of_its_own_chain(posed):
    """M18: the declared ``Z``, not the one of the data law."""
    posterior = posed.run(32, 600)
    assert abs(z_score(posed.ratio(posterior), 1.0)) < MAX_Z
    assert abs(z_score(posed.ideal().ratio(posterior), 1.0)) > 2 * MAX_Z
