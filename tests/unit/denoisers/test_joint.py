"""Sequences side by side: each predicted from its own part, counted part by part."""

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, JointDenoiser, TableDenoiser
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Uniform
from ppl_diffusion.testing import DenoiserContract
from ppl_diffusion.testing.toys import CountingDenoiser, random_joint

PROCESS = Absorbing(3)


def table(vocab_size, length, seed=0, process=None, **options):
    joint = random_joint(vocab_size, length, seed=seed)
    return TableDenoiser(joint, process or Absorbing(vocab_size), **options)


SHORT, LONG = table(3, 2), table(2, 3, seed=1)


class TestJoint(DenoiserContract):
    length, ignores_own_token = 4, True

    def make_process(self):
        return Uniform(3)

    def make_denoiser(self, process):
        part = table(3, 2, process=process)
        return JointDenoiser(process, [(part, 2), (part, 2)])


def test_every_part_is_predicted_by_its_own_denoiser():
    joint = JointDenoiser(PROCESS, [(SHORT, 2), (LONG, 3), (SHORT, 2)])
    tokens = torch.tensor([[[3, 0, 3, 1, 0, 3, 3], [1, 3, 1, 3, 3, 2, 3]]])
    log_c = joint(tokens, 0.5)
    own = torch.where(tokens[..., 2:5] == 3, 2, tokens[..., 2:5])  # the mask of two tokens
    torch.testing.assert_close(log_c[..., :2, :], SHORT(tokens[..., :2], 0.5))
    torch.testing.assert_close(log_c[..., 2:5, :2], LONG(own, 0.5))
    torch.testing.assert_close(log_c[..., 5:, :], SHORT(tokens[..., 5:], 0.5))
    assert bool((log_c[..., 2:5, 2] == -torch.inf).all())
    assert joint.kind == "cavity"
    assert joint.time_free


def test_labels_are_predicted_to_be_what_they_are():
    joint = JointDenoiser(PROCESS, [(SHORT, 2)], num_labels=2)
    log_c = joint(torch.tensor([[3, 3, 0, 2]]), 0.5)
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 1]]).log().double()
    torch.testing.assert_close(log_c[0, 2:], expected)


def test_rows_are_those_of_the_parts_and_known_parts_are_not_asked_again():
    first, second = CountingDenoiser(SHORT), CountingDenoiser(LONG)
    joint = JointDenoiser(PROCESS, [(first, 2), (second, 3)])
    outer = EvaluatedDenoiser(joint)
    with torch.no_grad():
        outer(torch.full((4, 5), 3), 1.0)
        assert (first.rows, second.rows) == (1, 1)
        outer(torch.tensor([[0, 3, 3, 3, 3], [1, 3, 3, 3, 3]]), 0.9)  # the second part waits
        assert (first.rows, second.rows) == (3, 1)
    assert outer.rows_evaluated == joint.rows_evaluated == 4


def test_copies_are_one_batch():
    counter = CountingDenoiser(SHORT)
    JointDenoiser(PROCESS, [(counter, 2), (counter, 2)])(torch.tensor([[3, 0, 0, 3]]), 0.5)
    assert (counter.calls, counter.rows) == (1, 2)


def test_times_of_rows_are_times_of_their_parts():
    process = Uniform(3)
    seen = []

    class Timed(TableDenoiser):
        def __call__(self, tokens, t, /):
            seen.append(t)
            return super().__call__(tokens, 0.5)

    part = Timed(random_joint(3, 2), process)
    joint = JointDenoiser(process, [(part, 2), (part, 2)])
    joint(torch.zeros(3, 4, dtype=torch.int64), torch.tensor([0.1, 0.2, 0.3]))
    assert seen[0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])


def test_parameters_are_those_of_all_parts_or_unknown():
    joint = JointDenoiser(PROCESS, [(SHORT, 2), (LONG, 3)])
    assert [p.shape for p in joint.parameters()] == [SHORT.joint.shape, LONG.joint.shape]

    class Secretive:
        vocab_size, kind, time_free = 3, "cavity", True

    assert not hasattr(JointDenoiser(PROCESS, [(Secretive(), 2)]), "parameters")


def test_parts_that_do_not_fit_are_refused():
    uniform = Uniform(3)
    cavity, posterior = (table(3, 2, process=uniform, kind=k) for k in ("cavity", "posterior"))
    with pytest.raises(CapabilityError, match="one part is a cavity denoiser and another"):
        JointDenoiser(uniform, [(cavity, 2), (posterior, 2)])
    with pytest.raises(CapabilityError, match=r"parts with \[2\] tokens do not fit"):
        JointDenoiser(uniform, [(LONG, 3)])
    with pytest.raises(CapabilityError, match=r"parts with \[3\] tokens do not fit"):
        JointDenoiser(Absorbing(2), [(SHORT, 2)])
    joint = JointDenoiser(PROCESS, [(SHORT, 2)])
    with pytest.raises(ValueError, match="for 2 positions, got 3"):
        joint(torch.zeros(1, 3, dtype=torch.int64), 0.5)
    assert "TableDenoiser" in repr(joint)


def test_a_kernel_runs_it():
    joint = JointDenoiser(PROCESS, [(SHORT, 2), (LONG, 3)])
    kernel = InterpolatingKernel(PROCESS, joint, num_steps=2)
    drawn = kernel.sample_path((50,), 5)
    assert bool((drawn.path[:, -1, 2:] < 2).all())
