"""A budget of sequences: look-aheads end when it is nearly spent, so that final values are paid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppl_diffusion.errors import PotentialError


class BudgetSpent(PotentialError):
    """A final value was needed, and the budget of its function was spent."""


@dataclass
class Budget:
    """Sequences that a function may be handed, repetitions included.

    A look-ahead may be any guess: what it adds to a weight is taken off again by the next one, and
    in the end the potential itself stands there. So the run goes on without new ones, and its
    weights stay right, as long as enough is kept back for the final values.

    :param total: sequences in all, None for no bound.
    :param reserve: how many are kept back for final values; None until somebody says so.
    """

    total: int | None
    reserve: int | None

    def left(self, asked: int, name: str, *, guess: bool) -> int | None:
        """Return how many more may be asked about, None for no bound.

        :param asked: sequences so far.
        :param name: how errors call the function.
        :param guess: whether it is for look-aheads.
        :raises PotentialError: if nobody said what final values need.
        """
        if self.total is None:
            return None
        if guess and self.reserve is None:
            raise PotentialError(
                f"{name} has a budget of {self.total} sequences, and nobody said how many of them "
                "final values need; pass reserve= (particles times runs)."
            )
        kept = (self.reserve or 0) if guess else 0
        return max(0, self.total - kept - asked)

    def spent(self, name: str, missing: int) -> BudgetSpent:
        """Return the error where a final value cannot be paid.

        :param missing: final sequences without an answer.
        """
        kept = f", of which {self.reserve} were kept back" if self.reserve is not None else ""
        return BudgetSpent(
            f"{name} has spent its budget of {self.total} sequences{kept}: {missing} final "
            "sequences have no value; give a larger budget, or keep more back with reserve= "
            "(particles times runs, and what retries take)."
        )

    def told(self, guessed: int) -> dict[str, Any]:
        """Return it in JSON types; empty where there is none.

        :param guessed: look-aheads that were not asked for.
        """
        if self.total is None:
            return {}
        entries = {"sequences": self.total, "reserve": self.reserve}
        return {"budget": {**entries, "guessed": guessed, "ended_look_aheads": guessed > 0}}
