"""Psi schedules: grids, rules, published figures, how far kappa may go, and their text form."""

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.kernels import (
    Absorbing,
    Cosine,
    Interpolating,
    InterpolatingKernel,
    Linear,
    LogLinear,
    Uniform,
)
from ppl_diffusion.kernels.kappa_rules import (
    backward,
    capped,
    constant_eta,
    fixed,
    kappa_room,
    rescaled,
)
from ppl_diffusion.kernels.psi import (
    SCHEDULES,
    PsiSchedule,
    ancestral,
    constant,
    dfm_corrector,
    forward_backward,
    parse_psi,
    predictor_corrector,
    profile,
    remdm_cap,
    remdm_loop,
    remdm_rescale,
    rescale_duo_compat,
)
from ppl_diffusion.testing import random_joint, site_rows

LINEAR = Linear()
EXAMPLES = ["ancestral", "constant:0.9", "remdm-cap:0.02", "remdm-rescale:0.05", "dfm:2", "dfm",
            "rescale-duo-compat:0.05", "remdm-loop:0.02", "forward-backward",
            "predictor-corrector"]  # fmt: skip


def levels(psi):
    return psi.alphas[:-1], psi.alphas[1:], psi.times[:-1]


@pytest.mark.parametrize("text", EXAMPLES)
@pytest.mark.parametrize("signal", [Linear(), LogLinear(), Cosine()], ids=repr)
@pytest.mark.parametrize("num_steps", [3, 40])
def test_every_schedule_is_a_chain(text, signal, num_steps):
    """Grid from 1 to 0 with the right levels, and kappa that the absorbing kernel accepts."""
    psi = parse_psi(text, signal, num_steps)
    assert psi.num_steps == num_steps == len(psi.times) - 1
    assert (psi.times[0], psi.times[-1]) == (1.0, 0.0)
    np.testing.assert_array_equal(psi.alphas, signal.alpha(psi.times))
    assert psi.expected_corrections == pytest.approx(((1 - psi.kappa) * (1 - psi.alphas[1:])).sum())
    process = Absorbing(3, signal)
    kernel = InterpolatingKernel(process, TableDenoiser(random_joint(3, 2), process), psi=psi)
    np.testing.assert_array_equal(kernel.kappa, psi.kappa)


def test_examples_are_all_schedules():
    assert {text.partition(":")[0] for text in EXAMPLES} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("psi", "sigma"),
    [
        (ancestral(LINEAR, 50), lambda a, b, t: 0 * a),
        (remdm_cap(LINEAR, 50, eta=0.03), lambda a, b, t: np.minimum(0.03, (1 - b) / a)),
        (remdm_rescale(LINEAR, 50, eta=0.3), lambda a, b, t: 0.3 * np.minimum(1, (1 - b) / a)),
        (forward_backward(LINEAR, 50), lambda a, b, t: (b - a) / a),
        (dfm_corrector(LINEAR, 50, weight=0.5), lambda a, b, t: 0.5 * (b - a) / a),
        (constant(LINEAR, 50, kappa=0.7), lambda a, b, t: 0.3 * (1 - b)),
        (
            constant(LINEAR, 50, kappa=0.7, t_on=0.5, t_off=0.1),
            lambda a, b, t: 0.3 * (1 - b) * ((t <= 0.5) & (t >= 0.1)),
        ),
        (predictor_corrector(LINEAR, 50), lambda a, b, t: 1 - b),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_remasking_probabilities(psi, sigma):
    """The formulas of the papers, wherever they are probabilities of a kernel."""
    a, b, t = (x[2:] for x in levels(psi))
    most = np.minimum(1, (1 - b) / a)
    np.testing.assert_allclose(psi.sigma[2:], np.minimum(sigma(a, b, t), most), atol=1e-12)


def test_adaptive_weight_of_the_flow_matching_corrector():
    psi = dfm_corrector(LINEAR, 400)
    a, b, t = levels(psi)
    inner = (t > 0.05) & (t < 0.95)
    expected = 10 * (t * (1 - t)) ** 0.25 * (b - a) / np.where(a > 0, a, 1)
    np.testing.assert_allclose(psi.sigma[inner], expected[inner], rtol=1e-10)


def test_published_rescale_is_not_its_definition():
    """At eta = 0.05 and 256 steps: 8.86 corrections per token against 0.62 of the released code."""
    right = remdm_rescale(LogLinear(), 256, eta=0.05)
    released = rescale_duo_compat(LogLinear(), 256, eta=0.05)
    assert round(right.expected_corrections, 2) == 8.86
    assert round(released.expected_corrections, 2) == 0.62


def test_loop_goes_holds_and_finishes():
    psi = remdm_loop(LINEAR, 100, eta=0.02)
    assert psi.alphas[45:96] == pytest.approx(np.full(51, 0.9), abs=1e-12)
    assert psi.alphas[44] < 0.9 - 1e-3
    assert psi.alphas[96] > 0.9 + 1e-3
    assert psi.sigma == pytest.approx([0] * 45 + [0.02] * 50 + [0] * 5, abs=1e-12)
    assert psi.expected_corrections == pytest.approx(1.0)
    np.testing.assert_array_equal(remdm_loop(LINEAR, 100, eta=0.02, t_c=0.1).kappa, psi.kappa)


def test_hold_inverts_the_schedule_exactly():
    """The level asked for is the level held, whatever the schedule's eps."""
    for signal in (LogLinear(eps=1e-2), Cosine()):
        psi = remdm_loop(signal, 100, eta=0.02, alpha_c=0.9)
        assert psi.alphas[70] == pytest.approx(0.9, abs=1e-12)


def test_profile_phases():
    """Each rule sees its own steps; without a hold the grid is even."""
    psi = profile(LINEAR, 10, modes=(fixed(1.0), fixed(0.5), fixed(0.25)), high=0.3, middle=0.5)
    assert psi.kappa.tolist() == [1.0] * 3 + [0.5] * 5 + [0.25] * 2
    np.testing.assert_allclose(psi.times, np.linspace(1, 0, 11))
    rules = (capped(0.1), constant_eta(0.05), rescaled(0.2))
    held = profile(LINEAR, 20, modes=rules, t_c=0.2, high=0.5, middle=0.25)
    a, b, t = levels(held)
    for rule, span in zip(rules, (slice(0, 10), slice(10, 15), slice(15, 20)), strict=True):
        np.testing.assert_array_equal(held.kappa[span], rule(a, b, t)[span])


def test_profile_compat_does_what_the_released_code_does():
    """Clips kappa, and forces the last step of every phase to one; otherwise nothing is forced."""
    modes = (fixed(-0.2), fixed(0.5), fixed(0.25))
    options = {"modes": modes, "high": 0.3, "middle": 0.5}
    compat = profile(LINEAR, 10, compat=True, **options)
    assert compat.kappa.tolist() == [0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.25, 1.0]
    plain = profile(LINEAR, 10, **options)
    assert plain.kappa.tolist() == [-0.2] * 3 + [0.5] * 5 + [0.25] * 2
    empty = profile(LINEAR, 4, modes=modes, high=0.0, middle=1.0, compat=True)
    assert empty.kappa.tolist() == [0.5, 0.5, 0.5, 1.0]


def test_phase_of_one_step_works():
    psi = profile(LINEAR, 3, modes=(fixed(1.0), capped(0.1), fixed(1.0)), high=0.34, middle=0.33)
    assert psi.kappa[1] < 1


def rows_of(process, c, a, b, kappa):
    states = torch.arange(process.num_states)
    return site_rows(process, states, torch.as_tensor(c).expand(len(states), -1), a, b, kappa)


PRIORS = [Absorbing(3), Uniform(2), Uniform(5), Interpolating([0.1, 0.2, 0.7]),
          Interpolating([0.0, 0.3, 0.7])]  # fmt: skip


@pytest.mark.parametrize("process", PRIORS, ids=lambda p: f"{type(p).__name__}{p.num_states}")
def test_kappa_room_is_tight(process):
    """By brute force over the denoiser: all rows are laws at the bound, and not below it."""
    rng = np.random.default_rng(0)
    corners = np.eye(process.vocab_size)
    for _ in range(60):
        a, b = np.sort(rng.uniform(size=2))
        room = kappa_room(process, np.array([a, b]))[0]
        assert room <= 0
        inside = rng.dirichlet(np.ones(process.vocab_size), size=20)
        at, below = (
            min(
                float(rows_of(process, c, a, b, kappa).min()) for c in np.concatenate([corners, cs])
            )
            for kappa, cs in ((room, inside), (room * 1.05 - 1e-3, corners[:0]))
        )
        assert at > -1e-12
        assert below < 0


def test_kappa_room_at_the_ends():
    """Without signal before, or without noise after, some or any kappa will do."""
    room = kappa_room(Uniform(3), np.array([0.0, 0.4, 0.4, 1.0]))
    assert room[0] == -np.inf
    assert room[2] == -np.inf
    assert -1 < room[1] < 0
    assert kappa_room(Uniform(3), np.array([0.0, 0.0]))[0] == pytest.approx(-0.5)
    assert kappa_room(Absorbing(3), np.array([0.0, 0.2]))[0] == pytest.approx(-0.25)


def test_kernel_refuses_what_has_no_room_and_within_mends_it():
    process = Uniform(4)
    denoiser = TableDenoiser(random_joint(4, 2), process)
    psi = remdm_cap(LINEAR, 30, eta=0.05)
    with pytest.raises(ValueError, match="makes a probability negative; raise it"):
        InterpolatingKernel(process, denoiser, psi=psi)
    mended = psi.within(process)
    InterpolatingKernel(process, denoiser, psi=mended)
    assert (mended.kappa >= psi.kappa).all()
    np.testing.assert_array_equal(mended.kappa[:20], psi.kappa[:20])
    np.testing.assert_array_equal(psi.within(Absorbing(4)).kappa, psi.kappa)


def test_text_with_options():
    psi = parse_psi(" constant:0.95, t_on=0.5,t_off=0.1", LINEAR, 20)
    np.testing.assert_array_equal(
        psi.kappa, constant(LINEAR, 20, kappa=0.95, t_on=0.5, t_off=0.1).kappa
    )
    loop = parse_psi("remdm-loop:eta=0.01,alpha_c=0.8", LINEAR, 20)
    assert loop.alphas[10] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "unknown kappa schedule 'foo'; choose from ancestral, constant, remdm-cap"),
        ("remdm-cap", "'remdm-cap' needs eta; write remdm-cap:NUMBER"),
        ("remdm-cap:much", "eta must be a number, got 'much'"),
        ("remdm-cap:2", r"'remdm-cap:2': eta must lie in \[0, 1\], got 2.0"),
        ("ancestral:1", "'ancestral' does not take '1'; it takes no numbers"),
        ("constant:0.9,q=3", "does not take 'q=3'; it takes kappa, t_on, t_off"),
        ("constant:0.9,0.8", "does not take '0.8'"),
        ("constant:0.9,t_on=0.1,t_off=0.5", "t_off must not exceed t_on, got 0.5 > 0.1"),
        ("constant:1.5", "kappa must be finite and at most 1"),
        ("remdm-loop:0.1,alpha_c=0.9,t_c=0.1", "give alpha_c or t_c, not both"),
        ("remdm-loop:0.1,alpha_c=1", "alpha_c must lie strictly between 0 and 1, got 1.0"),
        ("remdm-loop:0.1,high=0.9", r"high \+ middle must not exceed 1, got 0.9 \+ 0.5"),
        ("dfm:-1", "weight must be a finite number >= 0, got -1.0"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_psi(text, LINEAR, 10)


def test_hold_needs_room():
    """Short grids keep a step on either side of the hold; one step cannot."""
    assert remdm_loop(LINEAR, 2, eta=0.1).times.tolist() == pytest.approx([1.0, 0.1, 0.0])
    with pytest.raises(ValueError, match="a hold needs at least two steps, got 1"):
        remdm_loop(LINEAR, 1, eta=0.1)


def test_mistakes_in_python():
    with pytest.raises(ValueError, match="give three modes"):
        profile(LINEAR, 5, modes=(fixed(1.0),))
    with pytest.raises(ValueError, match="num_steps must be >= 1"):
        ancestral(LINEAR, 0)
    with pytest.raises(ValueError, match=r"weight must be a finite number >= 0, got inf"):
        backward(float("inf"))


def test_schedules_check_themselves():
    good = ancestral(LINEAR, 3)
    with pytest.raises(ValueError, match="4 times need as many alphas and 3 values of kappa"):
        PsiSchedule(good.times, np.ones(4), good.alphas, "x")
    with pytest.raises(ValueError, match="must decrease from exactly 1"):
        PsiSchedule(good.times[::-1], good.kappa, good.alphas, "x")
    with pytest.raises(ValueError, match="PsiSchedule x: kappa must be finite"):
        PsiSchedule(good.times, np.full(3, np.nan), good.alphas, "x")


def test_repr_reports_corrections():
    text = repr(remdm_rescale(LogLinear(), 256, eta=0.05))
    assert text.startswith("PsiSchedule(remdm-rescale(0.05), 256 steps, kappa 0.8999..1")
    assert "8.86 corrections per token" in text
    assert "kappa 1, 0 corrections" in repr(ancestral(LINEAR, 4))
