"""The latents of a program given its paths, moved by Pyro's own No-U-Turn sampler."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import NUTS
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.programs.reading import Program
from ppl_diffusion.programs.sites import is_deterministic
from ppl_diffusion.programs.tracking import OwnLaws


class LatentBlock:
    """NUTS on the continuous latents of all chains, given their paths; one adaptation for all.

    Where the law of a path depends on a latent, its density given the latent is part of the energy:
    every leapfrog step then costs the network calls of a whole path.

    :param program: the program with its arguments.
    :param paths: paths of every site of the first chain, ``(*plates, T + 1, L)``.
    :param num_transitions: transitions per update.
    :param warmup: transitions in which NUTS adapts.
    :param options: of :class:`pyro.infer.NUTS`.
    """

    def __init__(
        self,
        program: Program,
        paths: Mapping[str, Tensor],
        *,
        num_transitions: int,
        warmup: int,
        options: Mapping[str, Any],
    ) -> None:
        self.num_transitions, self.paths = num_transitions, dict(paths)
        dependent = {n for n in program.chain_names if program.ancestors(n) & set(program.latents)}

        def model(*args: Any, **kwargs: Any) -> None:
            with _GivenChains(self.paths, dependent, program.unread), OwnLaws():
                program.model(*args, **kwargs)

        self.kernel = NUTS(model, **{"max_tree_depth": 6, **options})
        with poutine.block():
            self.kernel.setup(warmup, *program.args, **program.kwargs)

    def update(
        self, paths: Mapping[str, Tensor], latents: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the latents of all chains after their transitions, each ``(C, ...)``."""
        drawn = []
        for c in range(len(next(iter(paths.values())))):
            self.paths = {name: path[c] for name, path in paths.items()}
            drawn.append(self._transitions({name: value[c] for name, value in latents.items()}))
        return {name: torch.stack([values[name] for values in drawn]) for name in latents}

    def _transitions(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        transforms = self.kernel.transforms
        params = {name: transforms[name](value) for name, value in latents.items()}
        self.kernel.clear_cache()  # it holds the energy given another path
        with poutine.block():
            for _ in range(self.num_transitions):
                params = self.kernel.sample(params)
        return {name: transforms[name].inv(value).detach() for name, value in params.items()}

    @property
    def num_divergences(self) -> int:
        """Divergent transitions after the warm-up."""
        return len(self.kernel._divergences)


class _GivenChains(Messenger):
    """Observe the chains' paths, and hide what the latents need not know.

    That is the density of chains that no latent enters, and latents that nothing reads.
    """

    def __init__(
        self, paths: Mapping[str, Tensor], dependent: set[str], unread: Collection[str]
    ) -> None:
        super().__init__()
        self.paths, self.dependent, self.unread = paths, dependent, unread

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        msg["stop"] = msg["stop"] or name in self.unread  # whatever is drawn there tells nothing
        if name not in self.paths:
            return
        msg["value"], msg["is_observed"] = self.paths[name], True
        if name not in self.dependent:
            msg["fn"] = dist.Delta(self.paths[name], event_dim=2)


def require_continuous(program: Program) -> None:
    """Refuse latents that NUTS cannot move."""
    for site in program.trace({}).nodes.values():
        if site["type"] != "sample" or site["is_observed"] or is_deterministic(site):
            continue
        moved = set(program.latents) - program.unread
        if site["name"] in moved and getattr(site["fn"].support, "is_discrete", False):
            raise CapabilityError(
                f"ParticleGibbs: the latent {site['name']!r} of {program.name} is discrete, which "
                "NUTS cannot move; sum it out, or use ppl_diffusion.inference.SMC."
            )
