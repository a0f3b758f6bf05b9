"""Who computes: torch, or JAX, which is an optional library."""

from __future__ import annotations

from types import ModuleType

from ppl_diffusion.jobs.checks import InputError, one_of, user_input

TORCH, NUMPYRO = "torch", "numpyro"
BACKENDS = (TORCH, NUMPYRO)


def is_jax(backend: str, device: str) -> bool:
    """Return whether JAX computes.

    :raises InputError: if the backend is none, or JAX is to find a device by torch's name.
    """
    one_of("backend", backend, BACKENDS)
    if backend == NUMPYRO and device != "cpu":
        raise InputError(
            f"JAX chooses its device by itself: drop --device {device}, or set JAX_PLATFORMS."
        )
    return backend == NUMPYRO


def jax_room() -> ModuleType:
    """Return ``ppl_diffusion.numpyro``.

    :raises InputError: if what it needs is not installed.
    """
    with user_input():
        import ppl_diffusion.numpyro as room
    return room
