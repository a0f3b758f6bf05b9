"""The exceptions of the package: each says what was wrong, where, and what to do."""


class CapabilityError(TypeError):
    """A kernel or denoiser cannot do what an inference program needs."""


class IntractableLogProb(NotImplementedError):
    """A density was asked for that has no tractable value; the text names what to call instead."""


class ParticleCollapse(RuntimeError):
    """Every particle of every run has weight zero, so there is nothing to average or resample."""


class PotentialError(ValueError):
    """A potential or reward returned NaN, ``+inf``, a wrong shape, raised, or timed out."""
