"""What particle Gibbs needs from a program: its density given one block, to move the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import NUTS
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference._arguments import require_program
from ppl_diffusion.inference._joint import Layout
from ppl_diffusion.inference._program import Program
from ppl_diffusion.inference._sites import is_chain, sample_sites
from ppl_diffusion.inference._task import PotentialLike
from ppl_diffusion.potentials import factor
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.smc.feynman_kac import EvaluatedPotential

if TYPE_CHECKING:
    from ppl_diffusion.inference.particle_gibbs import ParticleGibbs


class TokenBlock:
    """The token paths of a program: those of its chain site, or of all sites side by side.

    :param program: the program.
    :raises CapabilityError: if several sites cannot be run as one chain, or one of them is twisted.
    """

    def __init__(self, program: Program) -> None:
        self.sites, several = program.chains, len(program.chains) > 1
        owner = f"ParticleGibbs: {program.name}"
        self.layout = Layout(self.sites, owner=owner) if several else None
        self.chain = self.sites[0].chain if self.layout is None else self.layout.chain
        self.clamp = self.sites[0].clamp if self.layout is None else self.layout.clamp
        if several and any(site.twist is not None for site in self.sites):
            raise CapabilityError(
                f"{owner} has several chain sites, of which one is twisted; take the twist off, "
                "or use ppl_diffusion.inference.SMC."
            )
        self.proposal = self.clamp if several else self.sites[0].proposal

    @property
    def names(self) -> str:
        """The sites, to be named in a sentence."""
        return ", ".join(repr(site.name) for site in self.sites)

    def as_paths(self, x0: Tensor) -> dict[str, Tensor]:
        """Return the clean sequences of every site, each repeated as if it were a whole path.

        :param x0: int64 ``(*batch, L)``.
        """
        if self.layout is not None:
            return self.layout.as_paths(x0)
        return {self.sites[0].name: as_path(x0, self.sites[0].chain)}

    def whole_paths(self, path: Tensor) -> dict[str, Tensor]:
        """Return the path of every site.

        :param path: int64 ``(*batch, T + 1, L)``.
        """
        return self.own_paths(path) or {self.sites[0].name: path}

    def own_paths(self, path: Tensor) -> dict[str, Tensor]:
        """Return the path of every site where there are several, nothing for one.

        :param path: int64 ``(*batch, T + 1, L)``.
        """
        return {} if self.layout is None else self.layout.own_paths(path)

    def shown(self, states: Tensor, *, whole_path: bool = False) -> Tensor:
        """Return the states of the first site.

        :param states: int64 ``(*batch, L)``, or whole paths.
        :param whole_path: whether they are paths.
        """
        return states if self.layout is None else self.layout.first(states, whole_path=whole_path)


class LatentKernel:
    """NUTS on the continuous latents of all chains, given their paths; one adaptation for all.

    :param program: the program with its arguments.
    :param site: its token paths.
    :param options: the inference program.
    :param path: the chains' paths, int64 ``(C, *plates, T + 1, L)``.
    """

    def __init__(
        self, program: Program, site: TokenBlock, options: ParticleGibbs, path: Tensor
    ) -> None:
        self.num_transitions, self.given = options.num_transitions, path[0]

        def model(*args: Any, **kwargs: Any) -> None:
            with GivenChains(site.as_paths(self.given[..., -1, :])):
                program.model(*args, **kwargs)

        self.kernel = NUTS(model, **{"max_tree_depth": 6, **options.nuts})
        warmup = options.num_warmup * options.num_transitions * len(path)
        with poutine.block():
            self.kernel.setup(warmup, *program.args, **program.kwargs)

    def update(self, path: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the latents of all chains after their transitions, each ``(C, ...)``.

        :param path: the chains' paths.
        :param latents: where the latents stand, each ``(C, ...)``.
        """
        drawn = []
        for c, given in enumerate(path):
            self.given = given
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


class GivenChains(Messenger):
    """Set the chains' paths and take their density, which no latent enters, out of the program.

    :param paths: values of the chain sites.
    """

    def __init__(self, paths: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.paths = paths

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.paths:
            path = self.paths[msg["name"]]
            msg["value"], msg["is_observed"] = path, True
            msg["fn"] = dist.Delta(path, event_dim=2)


class GivenLatents(AbstractPotential):
    """The program's density of rows that hold a clean sequence and the number of its chain.

    :param program: the program with its arguments.
    :param site: its token paths.
    :param latents: values of all its other latents, each ``(C, ...)``.
    """

    name = "the program given its latents"

    def __init__(self, program: Program, site: TokenBlock, latents: Mapping[str, Tensor]) -> None:
        self.program, self.site, self.latents = program, site, latents

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return the log-density of observations and latents given each row."""
        return self._density(x0, lookahead=False)

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return its finite look-ahead."""
        return self._density(x0, lookahead=True)

    def _density(self, rows: Tensor, *, lookahead: bool) -> Tensor:
        chain, run = self.site.chain, rows[:, -1]
        x0 = rows[:, :-1].reshape(len(rows), *chain.batch_shape, chain.length)
        given = {name: value[run] for name, value in self.latents.items()}
        values = {**self.site.as_paths(x0), **given}
        return self.program.evaluate(values, len(rows)).log_density(lookahead=lookahead)


class PerChainPotential(EvaluatedPotential):
    """A potential of sequences and of the chain they belong to: the latents differ by chain."""

    def _evaluate(self, x0: Tensor, *, final: bool) -> Tensor:
        rows = x0.flatten(2 if final else 3)  # plates belong to the particle
        run = torch.arange(len(rows)).reshape(-1, *[1] * (rows.ndim - 1))
        rows = torch.cat([rows, run.expand(*rows.shape[:-1], 1)], -1)
        return super()._evaluate(rows, final=final)


def as_path(x0: Tensor, chain: ReverseChain) -> Tensor:
    """Return clean sequences repeated as if each were a whole path, ``(*batch, T + 1, L)``.

    :param x0: int64 ``(*batch, L)``.
    :param chain: the chain.
    """
    shape = (*x0.shape[:-1], chain.num_steps + 1, x0.shape[-1])
    return x0[..., None, :].expand(shape)


def as_program(
    target: ReverseChain | Callable[..., Any], potential: PotentialLike | None
) -> Callable[..., Any]:
    """Return the program itself, or one around a bare chain and its potential.

    :param target: a program or a reverse chain.
    :param potential: ``log G`` of a bare chain, None for a program.
    :raises TypeError: if a bare chain comes without a potential.
    :raises ValueError: if a program comes with one.
    """
    if not isinstance(target, ReverseChain):
        require_program("ParticleGibbs", target)
        if potential is not None:
            raise ValueError(
                "ParticleGibbs: a program is its own potential; write the potential into it with "
                "ppl_diffusion.potentials.factor."
            )
        return target
    if potential is None:
        raise TypeError(
            "ParticleGibbs: a bare chain needs a potential; pass one, such as "
            "Reward(dock, temperature=0.1)."
        )
    chain, known = target, potential

    def bare_chain() -> None:
        path = pyro.sample("path", chain)
        factor("potential", known, chain.x0(path))

    return bare_chain


def require_continuous(program: Program) -> None:
    """Refuse latents that NUTS cannot move.

    :param program: the program.
    :raises CapabilityError: if one of them is discrete.
    """
    for site in sample_sites(program.trace({}), program.owner):
        latent = not site["is_observed"] and not is_chain(site)
        if latent and getattr(site["fn"].support, "is_discrete", False):
            raise CapabilityError(
                f"ParticleGibbs: the latent {site['name']!r} of {program.name} is discrete, which "
                "NUTS cannot move; sum it out, or use ppl_diffusion.inference.SMC."
            )
