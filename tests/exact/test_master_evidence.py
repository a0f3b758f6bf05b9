"""M3: no program, resampler or threshold moves the mean of the evidence.

Every program on one enumerated problem (``conftest.py``), whose denoiser is wrong, so that nothing
is right because the chain happens to be exact. ``E[Z_hat] = Z`` and ``E[Z_hat f_hat] = Z E[f]`` at
four standard errors each: false-alarm rate 6e-5 per number for a normal mean, 3 % for the file's
480 numbers, once, at the fixed seeds.
"""

import pytest

MAX_Z = 4.0
RUNS = {2: 600, 8: 300}


@pytest.mark.parametrize("particles", RUNS)
def test_no_resampling_moves_the_evidence(posed, particles):
    """Thresholds 0, .5 and 1.01; two particles have an ESS of one at least, never below half."""
    for options in posed.schedules:
        if particles == 2 and options.get("ess_threshold") == 0.5:
            continue
        posterior = posed.run(particles, RUNS[particles], **options)
        worst = max(map(abs, posed.scores(posterior)))
        assert worst < MAX_Z, f"{options}: {worst:.1f} standard errors off"
        assert posterior.exact
