"""Checks that are read together."""

import pytest
import torch

from ppl_diffusion.deferred import deferred_checks, refuse_if

GOOD, BAD = torch.tensor(False), torch.tensor(True)


def complain() -> ValueError:
    return ValueError("the row is bad")


def test_a_check_raises_where_it_stands() -> None:
    refuse_if(GOOD, complain)
    with pytest.raises(ValueError, match="the row is bad"):
        refuse_if(BAD, complain)


def test_collected_checks_raise_when_they_are_read() -> None:
    with deferred_checks() as checks:
        refuse_if(BAD, complain)
        with pytest.raises(ValueError, match="the row is bad"):
            checks.read()
        assert checks.read(BAD, GOOD) == [True, False]  # noted once, read once


def test_unread_checks_raise_at_the_end() -> None:
    with pytest.raises(ValueError, match="the row is bad"), deferred_checks():
        refuse_if(BAD, complain)


def test_what_failed_since_is_blamed_on_the_check() -> None:
    with pytest.raises(ValueError, match="the row is bad") as caught:
        _fail_after(BAD)
    assert isinstance(caught.value.__cause__, KeyError)


def test_another_error_stays_as_it_is() -> None:
    with pytest.raises(KeyError, match="later"):
        _fail_after(GOOD)


def _fail_after(check: torch.Tensor) -> None:
    with deferred_checks():
        refuse_if(check, complain)
        raise KeyError("later")
