"""What is said about a restoration: how trustworthy, and how good where the truth is known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_diffusion.diagnostics.claims import knows_ess, number_or_none
from ppl_diffusion.diagnostics.report import root_ancestors
from ppl_diffusion.imaging import weighted
from ppl_diffusion.imaging.metrics import perceptual, psnr, ssim, unit
from ppl_diffusion.jobs.writing import evidence_entries
from ppl_diffusion.models import list_classifiers, load_classifier
from ppl_diffusion.restoration.images import Images
from ppl_diffusion.restoration.target import Target

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior


def summarise(target: Target, posterior: ParticlePosterior, images: Images) -> dict[str, Any]:
    """Return the summary of a run, ready for JSON, without its cost in time and decoder calls."""
    job, measurement = target.job, target.measurement
    joint = posterior.pooled_log_weights.flatten()
    known = knows_ess(posterior.settings)
    return {
        "image": job.question.image,
        "prior": job.name,
        "codec": job.codec,
        "operator": measurement.operator.label,
        "noise": measurement.sigma,
        "num_measured": measurement.operator.size,
        "method": job.search.method,
        "metrics": _metrics(target, images),
        "posterior": _posterior(target, images),
        **evidence_entries(posterior, job.search.method),
        "ess_pooled": math.exp(-float(torch.logsumexp(2 * joint, 0))) if known else None,
        "num_dead_runs": int((~posterior.alive).sum()),
        "effective_root_ancestors": root_ancestors(posterior),
        "unique": len(images.tokens),
        "num_particles": posterior.num_runs * posterior.num_particles,
        "denoiser_rows": posterior.num_evaluations,
        "potential_calls": posterior.num_potential_calls,
        "exact": posterior.exact,
        "target": posterior.target,
        "law": posterior.law.to_json(),
        "seed": job.search.seed,
        "settings": job.settings(),
        "notes": list(target.notes),
        "warnings": list(map(str, posterior.warnings)),
    }


def _metrics(target: Target, images: Images) -> dict[str, dict[str, float | None]]:
    """Return figures of single images: of what came out, and of what it is to be compared with.

    ``pseudo_inverse`` knows no prior; ``codec`` is the truth encoded and decoded, the best that any
    restoration through this codec can hope for.
    """
    measurement, truth = target.measurement, target.truth
    shown = {
        "restored": images.restored,
        "mean": images.mean,
        "pseudo_inverse": measurement.operator.pseudo_inverse(measurement.y),
    }
    if truth is not None:
        device = target.codec.codebook.device
        with torch.no_grad():
            shown["codec"] = target.codec(truth.to(device)).cpu().clamp(-1.0, 1.0)
    return {name: _figures(target, image.cpu()) for name, image in shown.items()}


def _figures(target: Target, image: Tensor) -> dict[str, float | None]:
    figures = {"residual": float(target.measurement.residual(image))}
    truth = target.truth
    if truth is not None:
        figures |= _likeness(target, image, truth)
    return {key: number_or_none(value) for key, value in figures.items()}


def _likeness(target: Target, image: Tensor, truth: Tensor) -> dict[str, float]:
    figures = {"psnr": float(psnr(image, truth))}
    if min(truth.shape[1:]) >= 7:
        figures |= {"ssim": float(ssim(image, truth))}
    name = f"{str(target.job.codec).removesuffix('-codec')}-classifier"
    if name in list_classifiers():
        figures |= {"perceptual": float(perceptual(image, truth, load_classifier(name)))}
    return figures


def _posterior(target: Target, images: Images) -> dict[str, float]:
    """Return figures of the weighted images together, on [0, 1]."""
    draws, weights = unit(images.draws), images.draw_weights
    figures = {"diversity": weighted.diversity(draws, weights)}
    if target.truth is not None:
        truth = unit(target.truth)
        figures |= {
            "crps": float(weighted.crps(truth, draws, weights).mean()),
            "coverage_90": weighted.coverage(truth, draws, weights),
        }
    return figures
