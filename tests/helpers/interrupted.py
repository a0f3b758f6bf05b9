"""A run that is stopped at a boundary of its steps, and goes on in another object."""

import signal
from contextlib import contextmanager

import pytest
import torch

from ppl_diffusion.smc import checkpoint
from ppl_diffusion.smc.checkpoint import RunStopped, RunStore, keep_run


class Counting(RunStore):
    """A store that counts the boundaries of steps, and ends the run at one of them."""

    last = None
    boundaries = 0

    @property
    def is_due(self):
        self.boundaries += 1
        if self.boundaries == self.last:
            self.stop(signal.SIGTERM)
        return super().is_due


@contextmanager
def kept(folder, last=None, resume=False):
    """Keep a run, writing at every boundary, and end it at the given one."""
    usual, checkpoint.RunStore = checkpoint.RunStore, Counting
    try:
        with keep_run(folder, {}, resume=resume, every=0.0) as store:
            store.last = last
            yield store
    finally:
        checkpoint.RunStore = usual


def differences(left, right):
    """Return the names of fields in which two results are not the same bits."""
    names = [name for name in vars(left) if name not in ("seconds", "origin")]
    return [name for name in names if not same(getattr(left, name), getattr(right, name))]


def same(left, right):
    if isinstance(left, torch.Tensor):
        equal = torch.equal(left, right) or torch.equal(left.isnan(), right.isnan())
        return equal and torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and left != left:
        return right != right
    return left == right


def resumed(make, folder, most):
    """Interrupt a run at its boundaries, each time from the start, and yield what came of going on.

    :param make: runs it in fresh objects.
    :param most: interruptions at most, evenly spread; None for every boundary.
    """
    with kept(folder / "whole") as store:
        make()
    assert store._open, "the state could not be written"
    count = store.boundaries
    stride = 1 if most is None else -(-count // most)
    for last in range(count, 0, -stride):
        place = folder / str(last)
        with pytest.raises(RunStopped) as stopped, kept(place, last):
            make()
        assert stopped.value.kept
        torch.manual_seed(last)  # nothing may depend on what the process did before
        with kept(place, resume=True):
            yield last, make()
