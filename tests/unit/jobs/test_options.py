"""Options of methods whose fields have one name and several meanings, or are in an object."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from ppl_diffusion.inference import Method, register
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.jobs.options import options, usual
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.programs.method import METHODS


@dataclass(frozen=True)
class Loop:
    """An inner loop.

    :param num_turns: how many turns it makes.
    :param keep: which turn is kept.
    :param tau: means something else to the method.
    """

    num_turns: int = 7
    keep: Literal["first", "last"] | None = "last"
    tau: float = 1.0


@pytest.fixture
def looping():
    @register
    @dataclass(frozen=True)
    class Looping(Method):
        """Loop.

        :param loop: the inner loop.
        :param tau: a temperature of its own.
        """

        loop: Loop = field(default_factory=lambda: Loop(num_turns=9))
        tau: float = 2.0

        name: ClassVar[str] = "looping"

    yield Looping
    del METHODS["looping"]


def made(**asked):
    return Search(method="looping", options=asked).make()


def test_the_fields_of_an_inner_object_are_options(looping):
    assert made() == looping()
    assert made(num_turns=3) == looping(loop=Loop(num_turns=3))
    assert made(keep="first") == looping(loop=Loop(num_turns=9, keep="first"))
    assert made(keep="none") == looping(loop=Loop(num_turns=9, keep=None))
    assert usual("looping") == {"tau": 2.0, "num_turns": 9, "keep": "last"}


def test_the_methods_own_fields_come_first(looping):
    assert made(tau=3.0) == looping(tau=3.0)
    assert options()["tau"].owners["looping"].part is None


def test_one_name_may_mean_different_things(looping):
    keep = options()["keep"]
    assert keep.kind is str  # a count to one, a word to another
    assert Search(method="best-of-n", options={"keep": "2"}).make().keep == 2
    assert Search(method="best-of-n", options={"keep": "2"}).options == {"keep": 2}
    with pytest.raises(InputError, match="keep is a number here, not 'last'"):
        Search(method="best-of-n", options={"keep": "last"})
    with pytest.raises(InputError, match="no keep called '2': choose one of first, last, none"):
        made(keep="2")


def test_what_is_refined_does_not_take_the_name_of_the_method_for_its_own_option():
    asked = {"inner": "aps-smc", "num_iterations": 3}
    method = Search(method="refinement", options=asked).make()
    assert method.inner.name == "aps-smc"
    assert method.inner.expectation.num_iterations == 3
    assert method.inner.expectation.inner == "gradient"
