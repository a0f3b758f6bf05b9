"""Every rule that results are held to, and what they say of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppl_diffusion.smc import latent_rules, particle_rules, question_rules
from ppl_diffusion.smc.verdict import Verdict, by_level

# Known by its fields: naming the class, whose ``warnings`` come from here, would close a circle.
ParticlePosterior = Any
Rule = Callable[[ParticlePosterior], Verdict | None]
SEARCH_RULES: tuple[Rule, ...] = (
    question_rules.constraint,
    question_rules.reward,
    question_rules.steps,
)
RULES: tuple[Rule, ...] = (
    particle_rules.dead,
    particle_rules.mass,
    particle_rules.roots,
    latent_rules.latent,
    particle_rules.copies,
    particle_rules.khat_of_weights,
    particle_rules.ess_end,
    particle_rules.ess_path,
    particle_rules.apart,
    *SEARCH_RULES,
    question_rules.stuck,
    question_rules.lookahead,
    question_rules.reweighted,
)


def judge(posterior: ParticlePosterior) -> list[Verdict]:
    """Return what is wrong with a particle posterior, the worst first; empty if nothing is.

    Results without evidence (searches) are held to what can be wrong with them only.

    :param posterior: the result.
    """
    rules = RULES if posterior.law.has_evidence else SEARCH_RULES
    found = (rule(posterior) for rule in rules)
    return by_level(verdict for verdict in found if verdict is not None)
