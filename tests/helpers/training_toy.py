"""A small training run of its own process: ``python training_toy.py FOLDER [--resume]``."""

import sys
import time

import torch

from ppl_diffusion.models.datasets import Sequences
from ppl_diffusion.models.recipes import Recipe
from ppl_diffusion.models.training import train

LENGTH, STEPS = 8, 20
RECIPE = Recipe(
    family="masked",
    dataset="none",
    shape={"dim": 16, "depth": 1, "heads": 2, "dropout": 0.1, "stem_width": 3},
    steps=STEPS,
    batch_size=32,
    learning_rate=2e-2,
    warmup=2,
    ema_decay=0.9,
    shares=(0.5, 1.0),
    validate_every=5,
    markov_order=1,
)


def letters():
    """Sequences that repeat one letter: one token tells all others."""
    rows = torch.arange(4)[:, None].expand(4, LENGTH).repeat(16, 1)
    return Sequences(
        train=rows,
        valid=rows[:16],
        test=rows[:8],
        test_family=torch.arange(8),
        related=rows,
        related_weights=torch.ones(len(rows), dtype=torch.float64),
        licence="Data: made up.",
        source="Repeated letters.",
    )


def run(out, **options):
    return train("toy", out=out, recipe=RECIPE, sequences=letters(), quiet=True, **options)


def main(out, *flags):
    from ppl_diffusion.models.fitting import Fit

    plain = Fit.training_step

    def slowly(self, *args):
        time.sleep(0.1)  # so that there is a moment at which to be killed
        return plain(self, *args)

    Fit.training_step = slowly
    run(out, resume="--resume" in flags, every=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
