"""What checkpoints hold, and what happens where they cannot."""

import io
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from interrupted import differences, kept

from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, checkpoint, run_smc
from ppl_diffusion.smc.checkpoint import RunStopped, asked_before, keep_run
from ppl_diffusion.smc.portable import NotPortable, packed, portable, unpacked
from ppl_diffusion.testing.toys import toy_markov_chain


class Pair(NamedTuple):
    left: torch.Tensor
    right: object


class Held:
    def __init__(self):
        self.kept, self.head = torch.ones(2), print


def through_a_file(value):
    file = io.BytesIO()
    torch.save(packed(value), file)
    file.seek(0)
    return unpacked(torch.load(file, weights_only=True))


def toy(particles=8, generator=None):
    chain = toy_markov_chain(length=6, num_steps=4)
    pairs = Potential(lambda x0: 1.5 * (x0[..., :-1] == x0[..., 1:]).sum(-1), name="pairs")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return run_smc(FeynmanKac(chain, pairs, twist="argmax"), particles, 2, generator=generator)


def test_values_come_back_as_they_were():
    portable(Pair)
    x = torch.arange(3)
    value = {"a": [1, 2.5, None, "word"], 3: (True, torch.Size([2, 3])), b"\xff\x00": {1, 2}}
    back = through_a_file({**value, "pair": Pair(x, (x, float("-inf")))})
    assert {key: back[key] for key in value} == value
    assert torch.equal(back["pair"].left, x)
    assert back["pair"].left is back["pair"].right[0]  # by which caches know it


def test_what_an_owner_puts_back_is_left_out():
    portable(Held, "head")
    back = through_a_file(Held())
    assert torch.equal(back.kept, torch.ones(2))
    assert not hasattr(back, "head")


def test_what_is_not_portable_is_named():
    with pytest.raises(NotPortable, match=r"^builtins\.object$"):
        packed({"a": [object()]})


def test_a_class_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"holds the class 'os\.system', which is not known here"):
        unpacked(("object", "os.system", (), ()))


def test_a_state_that_no_file_can_hold_does_not_end_the_run(tmp_path, monkeypatch):
    whole = toy()

    def refuse(owner):
        raise NotPortable("mine.Engine")

    monkeypatch.setattr(checkpoint, "memory_of", refuse)
    with keep_run(tmp_path, {}, every=0.0), pytest.warns(UserWarning, match="no more") as told:
        posterior = toy()
    place = str(tmp_path)
    assert [str(w.message) for w in told] == [
        f"no more checkpoints of this run are written to {place!r} (mine.Engine); it goes on, and "
        "can be resumed from the last one."
    ]
    assert not differences(whole, posterior)


def test_the_memory_matters(tmp_path, monkeypatch):
    """The failing twin: without counters and caches a resumed run is another one."""
    whole = toy()
    with pytest.raises(RunStopped), kept(tmp_path, last=3):
        toy()
    monkeypatch.setattr(checkpoint, "remember", lambda owner, memory: None)
    with kept(tmp_path, resume=True):
        assert {"num_evaluations", "num_potential_calls"} <= set(differences(whole, toy()))


def test_a_stage_of_another_run_is_refused(tmp_path):
    with pytest.raises(RunStopped), kept(tmp_path, last=3):
        toy()
    with pytest.raises(ValueError) as refused, kept(tmp_path, resume=True):
        toy(particles=9)
    place = str(tmp_path / "stage-0000.pt")
    assert str(refused.value) == (
        f"The file {place!r} is of another run (('smc', 4, 2, 8), not ('smc', 4, 2, 9)); begin "
        "anew without --resume."
    )


def test_beginning_anew_forgets_what_was_kept(tmp_path):
    with pytest.raises(RunStopped), kept(tmp_path, last=3):
        toy()
    assert asked_before(tmp_path) == {}
    with keep_run(tmp_path, {"seed": 1}):
        assert not list(tmp_path.glob("stage-*"))
        assert asked_before(tmp_path) == {"seed": 1}


def test_nothing_is_kept_where_nobody_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy()
    assert not list(Path().iterdir())


def test_nothing_is_written_before_it_is_due(tmp_path):
    with keep_run(tmp_path, {}, every=3600.0):
        toy()
    assert not list(tmp_path.glob("stage-*"))
