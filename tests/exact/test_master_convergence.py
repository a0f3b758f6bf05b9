"""M5: the law of one weighted draw per run is the declared one, and comes nearer with N.

Every program on the problem of ``conftest.py``. Pearson's test rejects at 1e-4, cells expected
fewer than five times taken together: false alarms .2 % for the file, once, at the fixed seeds.
"""

import torch

from ppl_diffusion.testing import chi_square_p_value, state_index, total_variation

LEVEL = 1e-4


def test_one_weighted_draw_per_run_has_the_declared_law(posed):
    """At N = 256, 200 runs over 16 sequences."""
    generator = torch.Generator().manual_seed(2)
    drawn = posed.run(256, 200).resample(1, generator=generator, pooled=False)
    counts = torch.bincount(state_index(drawn["x0"][:, 0], 2), minlength=16).double()
    law, rare = posed.x0_law, posed.x0_law < 5 / 200
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, law)]
    assert len(pooled[0]) >= 4
    assert chi_square_p_value(*pooled) > LEVEL


def test_the_law_comes_nearer_with_more_particles(posed):
    """N = 8, 32, 128 at a steep potential: bias .05 to .3 at first, noise below .02 at last.

    The law of one draw is averaged over the particles of all runs.
    """
    steep, near = posed.again(power=2.0), []
    for particles, runs in ((8, 1500), (32, 400), (128, 150)):
        law = steep.mixed_law(steep.run(particles, runs))
        near.append(total_variation(law, steep.x0_law))
    assert near[0] > near[1] > near[2] - 0.01
    assert near[0] > 1.5 * near[2]
