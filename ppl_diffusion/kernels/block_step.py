"""One reverse step that draws latents beside the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.kernels.step import StepDistribution


class BlockStep(TorchDistribution):
    """Blocks that are independent given the carry, the tokens among them; values are dicts.

    The joint density is exact where those of the blocks are. A step whose blocks read each other
    is a class of its own with the same three methods.

    :param blocks: the law of each block, ``"tokens"`` (event shape ``(L,)``, the event shape of
        this distribution) and latents, discrete or continuous.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)

    def __init__(self, blocks: Mapping[str, TorchDistribution]) -> None:
        self.blocks = dict(blocks)
        batch = torch.broadcast_shapes(*(law.batch_shape for law in blocks.values()))
        super().__init__(torch.Size(batch), blocks[TOKENS].event_shape, validate_args=False)

    def with_block(self, name: str, law: TorchDistribution) -> BlockStep:
        """Return the same step with another law of one block.

        :param name: the block.
        :param law: its law, of the same shapes.
        """
        return BlockStep({**self.blocks, name: law})

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draw all blocks.

        :returns: ``(*sample_shape, *batch, *event)`` of each block.
        """
        return {
            name: _draw(law.expand(self.batch_shape), torch.Size(sample_shape), generator)
            for name, law in self.blocks.items()
        }

    def log_prob(self, value: Mapping[str, Tensor]) -> Tensor:
        """Return the joint log-density of all blocks, the broadcast batch shape.

        :param value: every block, ``(*sample, *batch, *event)``.
        """
        terms = [law.log_prob(value[name]) for name, law in self.blocks.items()]
        total: Tensor = sum(terms[1:], terms[0])
        return total


def _draw(law: TorchDistribution, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return law.sample(shape)
    if isinstance(law, StepDistribution):
        return law.sample(shape, generator=generator)
    # Other people's distributions take no generator: lend them the global one, seeded by it.
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        return law.sample(shape)
