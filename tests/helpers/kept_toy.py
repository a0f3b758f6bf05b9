"""A small job of its own process: ``python kept_toy.py FOLDER``; run again it goes on."""

import sys
import time
from pathlib import Path

from ppl_diffusion.inference import SMC
from ppl_diffusion.jobs.checks import JobStopped
from ppl_diffusion.jobs.folder import whole_folder
from ppl_diffusion.jobs.keeping import kept_job
from ppl_diffusion.jobs.writing import timeless
from ppl_diffusion.potentials import Potential
from ppl_diffusion.testing.toys import toy_markov_chain


def pairs(x0):
    time.sleep(0.02)  # so that there is a moment at which to be killed
    return 1.5 * (x0[..., :-1] == x0[..., 1:]).sum(-1)


def main(folder):
    chain = toy_markov_chain(length=8, num_steps=16)
    runner = SMC(chain, Potential(pairs), method="refinement", num_particles=16, num_runs=2)
    with kept_job(folder, {"seed": 0}, resume=True, every=0.0):
        posterior = timeless(runner.run(seed=0))
        with whole_folder(folder, replace=False) as place:
            posterior.save(place)
            (place / "summary.json").write_text("{}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except JobStopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(stopped.code) from None
