"""Tell a result that was read from a file which program it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ppl_diffusion.programs.reading import Program
from ppl_diffusion.programs.replay import Replay
from ppl_diffusion.smc.draws import Draws

AnyDraws = TypeVar("AnyDraws", bound=Draws)


def attach(
    posterior: AnyDraws,
    model: Callable[..., Any],
    *args: Any,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> AnyDraws:
    """Return a result that knows its program again, which files do not keep.

    :param posterior: the result of a program.
    :param model: the program.
    :param args: the arguments it was run with.
    :param vectorize_particles: as for :class:`~ppl_diffusion.inference.SMC`.
    :param kwargs: its keyword arguments.
    :raises ValueError: if the result is of another program, or of other arguments.

    Example::

        posterior = attach(Draws.load("runs/assay"), assay, y=torch.tensor(12.0))
        posterior.to_arviz(log_likelihood=True)
    """
    origin = Replay(Program(model, args, kwargs, vectorize=vectorize_particles, owner="attach"))
    theirs, ours = origin.law, posterior.law
    same = (theirs.chains, theirs.latents) == (ours.chains, ours.latents)
    # What a program observes is in the digest of its tilt, so that other arguments show, too.
    asked = [tilt.digest for tilt in theirs.tilts] == [tilt.digest for tilt in ours.tilts]
    if not posterior.is_program or not same or not asked:
        alike = same and posterior.is_program and str(theirs) == str(ours)
        reason = "the data differ" if alike else f"its law is '{ours}', not '{theirs}'"
        raise ValueError(
            f"attach: this is no result of {origin.program.name} at these arguments: {reason}; "
            "give the program and what it was run with."
        )
    return posterior.with_origin(origin)
