"""Training objectives: they learn, and they are what they say."""

import pytest
import torch

from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion
from ppl_diffusion.models.distillation import Distillation
from ppl_diffusion.models.objectives import Curriculum, Nelbo, duo_schedule
from ppl_diffusion.models.program import stratified_times
from ppl_diffusion.models.recipes import OBJECTIVES, RECIPES
from ppl_diffusion.models.training import train
from ppl_diffusion.processes import nelbo_terms


@pytest.fixture
def letters(make_sequences):
    """Sequences that repeat one of six letters: one token tells all others."""
    return make_sequences(torch.arange(60)[:, None].expand(60, 6) % 6, "abcdef")


def test_the_fused_bound_is_the_dense_one(make_program, draw_rows):
    """Terms of a program around a transformer, against the definition on its log-probabilities."""
    program, rows = make_program(), draw_rows(50)
    t = torch.rand(50, 1, dtype=torch.float64)
    z = torch.randint(6, rows.shape)
    dense = nelbo_terms(program.process, rows, z, program.denoiser(z, t[:, 0]), t)
    torch.testing.assert_close(program._bound_at(rows, z, t, {}), dense, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": None}, {"share": 1.0, "tau": 0.1}])
def test_twenty_steps_of_the_curriculum_lower_the_bound(letters, tmp_path, options, make_recipe):
    recipe = make_recipe(objective="curriculum", options=options)
    run = train("toy", out=tmp_path, recipe=recipe, sequences=letters, quiet=True)
    # Untrained it is log2(6) = 2.58 bits.
    assert run.valid_bits < 1.9


def test_the_soft_loss_goes_down(make_program):
    """On the same rows, latents and times before and after training by it."""
    program = make_program()
    curriculum = Curriculum(program, steps=10, tau=0.05, top_k=2)
    rows = torch.arange(60)[:, None].expand(60, 6) % 6
    optimizer = torch.optim.Adam(program.denoiser.parameters(), lr=2e-2)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = curriculum.soft_loss(rows)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("top_k", [2, None])
def test_without_temperature_soft_inputs_are_the_tokens(top_k, make_program, draw_rows):
    """At tau -> 0 the loss is the integrand of the bound at the argmax, times d alpha / d t."""
    program, rows = make_program(), draw_rows(40)
    curriculum = Curriculum(program, steps=10, tau=1e-12, top_k=top_k)
    torch.manual_seed(3)
    soft = curriculum.soft_loss(rows)
    torch.manual_seed(3)
    t = stratified_times(rows)[:, None]
    _, _, z = curriculum._latents(rows, curriculum.schedule.mu(t))
    own = 1.0 - curriculum.schedule.alpha(t)
    hard = nelbo_terms(program.process, rows, z, program.denoiser(z, own[:, 0]), own)
    expected = (hard * -curriculum.schedule.alpha_prime(t)).sum(-1).mean()
    torch.testing.assert_close(soft, expected, rtol=1e-4, atol=0.0)
    # With a temperature the input is another one: the test can fail.
    torch.manual_seed(3)
    other = Curriculum(program, steps=10, tau=1.0, top_k=top_k).soft_loss(rows)
    assert abs(float(other - expected)) > 1e-2 * float(expected)


def test_the_curriculum_ends_in_the_bound(make_program, draw_rows):
    program, rows = make_program(), draw_rows(8)
    curriculum = Curriculum(program, steps=10, share=0.4, tau=1.0)
    for step, soft in ((3, True), (4, False), (9, False)):
        torch.manual_seed(1)
        loss = curriculum.loss(rows, step)
        torch.manual_seed(1)
        expected = curriculum.soft_loss(rows) if soft else Nelbo(program, steps=10).loss(rows, step)
        assert torch.equal(loss, expected)


def test_small_vocabularies_are_drawn_whole(make_program):
    assert Curriculum(make_program(), steps=10, top_k=5).top_k is None
    assert Curriculum(make_program(), steps=10, top_k=4).top_k == 4


def test_the_published_window_is_found():
    duo = duo_schedule(50_257, (0.0493, 0.945))
    assert duo.gamma_min == pytest.approx(-3.55, abs=0.005)
    assert duo.gamma_max == pytest.approx(-1.85, abs=0.005)


@pytest.mark.parametrize("objective", ["curriculum", "distillation"])
def test_masked_priors_are_refused(letters, tmp_path, objective, make_program):
    program = make_program(MaskedDiffusion)
    make = {"curriculum": Curriculum, "distillation": Distillation}[objective]
    with pytest.raises(ValueError, match=f"{objective}: only the uniform process"):
        make(program, steps=10)


def test_wrong_requests_are_refused(letters, tmp_path, make_recipe, make_program):
    options = {"out": tmp_path, "recipe": make_recipe(), "sequences": letters, "quiet": True}
    UniformDiffusion.build("abc", 2, **make_recipe().shape).save(tmp_path / "other")
    with pytest.raises(ValueError, match="no objective 'x': choose one of nelbo, curriculum, dis"):
        train("toy", objective="x", **options)
    with pytest.raises(ValueError, match="is uniform over 2 tokens of 'abc', but toy needs"):
        train("toy", init=tmp_path / "other", **options)
    with pytest.raises(ValueError, match="There is no prior 'toy'"):
        train("toy", objective="distillation", **options)
    with pytest.raises(ValueError, match="share must lie in"):
        Curriculum(make_program(), steps=10, share=1.5)
    with pytest.raises(ValueError, match="0 < low < high < 1"):
        Curriculum(make_program(), steps=10, alphas=(0.9, 0.1))
    for tau in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tau must be a positive number"):
            Curriculum(make_program(), steps=10, tau=tau)
    for top_k in (0, -3, 2.5):
        with pytest.raises(ValueError, match="top_k must be an integer from 1 up"):
            Curriculum(make_program(), steps=10, top_k=top_k)
    with pytest.raises(ValueError, match=r"rounds must be an integer from 1 up, got 1\.5"):
        Distillation(make_program(), steps=10, rounds=1.5)
    with pytest.raises(ValueError, match=r"11 rounds from delta 0\.00195 end outside"):
        Distillation(make_program(), steps=10, rounds=11)


def test_recipes_are_turned_to_other_objectives():
    recipe = RECIPES["yeast-promoter-uniform"]
    assert [recipe.with_objective(name).objective for name in OBJECTIVES] == list(OBJECTIVES)
    assert recipe.with_objective("nelbo") is recipe
    distil = recipe.with_objective("distillation")
    assert distil.learning_rate == pytest.approx(recipe.learning_rate / 5)
    assert (distil.decay, recipe.decay) == ("none", "cosine")
    assert distil.with_objective("distillation") is distil
