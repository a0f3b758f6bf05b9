"""Bytes of a result, to tell whether two runs gave the same one."""

import dataclasses
import hashlib

from torch import Tensor

from ppl_diffusion.smc.draws import Draws


def digests(posterior: Draws) -> dict[str, str]:
    """Return a digest of each tensor of a posterior, and of those of its sites."""
    values = {f.name: getattr(posterior, f.name) for f in dataclasses.fields(posterior)}
    values |= {f"site {name}": value for name, value in posterior.samples.items()}
    return {name: _digest(value) for name, value in values.items() if isinstance(value, Tensor)}


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
