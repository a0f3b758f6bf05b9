"""Training a latent: it learns in two stages, resumes, and collapses in none."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from ppl_diffusion.models import LatentDiffusion, latent_objective, load
from ppl_diffusion.models import training as training_module
from ppl_diffusion.models.latent_objective import LatentObjective
from ppl_diffusion.models.latent_phases import draw_phases
from ppl_diffusion.models.latent_terms import squared_error_weight
from ppl_diffusion.models.training import train
from ppl_diffusion.processes.gaussian import Gaussian

SHAPE = {"dim": 16, "depth": 1, "heads": 2, "encoder_depth": 1, "num_slots": 2, "latent_dim": 4}
KINDS = {"codes": {"num_codes": 4}, "drawn": {"num_codes": 4, "quantiser": "gumbel"}, "vectors": {}}


@pytest.fixture
def letters(make_sequences):
    """Sequences that repeat one of six letters: one code tells all."""
    return make_sequences(torch.arange(60)[:, None].expand(60, 6) % 6, "abcdef")


@pytest.fixture
def rows():
    return torch.arange(60)[:, None].expand(60, 6) % 6


@pytest.fixture
def recipe(make_recipe):
    return lambda kind="codes", **options: make_recipe(
        family="latent", objective="latent", shape=SHAPE | KINDS[kind], options=options
    )


def make(kind="codes", *, steps=10, **options):
    program = LatentDiffusion.build("abcdef", 6, **SHAPE, **KINDS[kind])
    with torch.no_grad():  # a fresh network starts with heads that pass no gradient
        program.denoiser.vocabulary.weight.normal_(0.0, 0.2)
        program.denoiser.prediction.weight.normal_(0.0, 0.2)
    return LatentObjective(program, steps=steps, **options)


def gradients(objective, rows, step):
    network = objective.network
    network.zero_grad()
    objective.loss(rows, step).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_bound(letters, recipe, kind, tmp_path):
    """Untrained, tokens pay 2.6 bits each, codes 0.7 and vectors 17.8 per token."""
    longer = dataclasses.replace(recipe(kind), steps=150)
    run = train("toy", out=tmp_path, recipe=longer, sequences=letters, quiet=True)
    assert run.valid_bits < (12.0 if kind == "vectors" else 2.0)
    again, x0 = load(tmp_path / "prior"), letters.valid
    assert torch.equal(again.encode_latent(x0), run.program.encode_latent(x0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [5, 15])
def test_a_resumed_run_equals_the_unbroken_one(letters, recipe, kind, done, tmp_path, monkeypatch):
    """Stopped in the first stage and in the second; the moving averages of codes go on as well."""

    def run(out, **options):
        return train("toy", out=out, recipe=recipe(kind), sequences=letters, quiet=True, **options)

    whole = run(tmp_path / "whole")
    original = training_module._trainer

    def stopped(*args):
        trainer = original(*args)
        trainer.fit_loop.max_epochs = done // 5
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(training_module, "_trainer", stopped)
        assert run(tmp_path / "half").steps == done
    resumed = run(tmp_path / "half", resume=True)
    for name, value in whole.program.denoiser.state_dict().items():
        assert torch.equal(value, resumed.program.denoiser.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_only_tokens_move_the_encoder_and_only_at_first(rows, kind):
    objective = make(kind, steps=10, learning=0.5)
    first, second = gradients(objective, rows, 0), gradients(objective, rows, 9)
    assert first["encoder.output.weight"].abs().max() > 0
    assert "prediction.weight" not in first
    assert not any(name.startswith("encoder") or name == "codebook" for name in second)
    assert second["prediction.weight"].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_of_a_live_latent_does_not_move_the_encoder(rows, kind):
    """With the tokens' loss away there is nothing left that could move it."""
    quantiser = {"commitment": 0.0} if kind == "codes" else None
    objective = make(kind, steps=10, learning=0.0, frozen=False, mixed=0.5, quantiser=quantiser)
    assert gradients(objective, rows, 5)["encoder.output.weight"].abs().max() > 0
    objective._token_loss = lambda *args: torch.zeros(())
    found = gradients(objective, rows, 5)
    assert found["prediction.weight"].abs().max() > 0
    assert found.get("encoder.output.weight", torch.zeros(1)).abs().max() == 0


@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_a_frozen_encoder_settles_and_then_says_the_same(rows, kind, monkeypatch):
    """Its scale is measured anew when it stops: moments that ran beside it lag."""
    monkeypatch.setattr(latent_objective, "_SETTLING", 3)
    objective = make(kind, steps=12, learning=0.4)
    network = objective.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    said, scales = [], []
    for step in range(12):
        optimizer.zero_grad()
        objective.loss(rows, step).backward()
        optimizer.step()
        said.append(network.encode(rows))
        scales.append(network.encoder(rows).var(0, correction=0))
    assert not torch.equal(said[0], said[-1])
    assert all(torch.equal(said[7], later) for later in said[7:])
    torch.testing.assert_close(scales[-1], torch.ones(2, 4), atol=0.05, rtol=0)
    assert not torch.allclose(scales[4], torch.ones(2, 4), atol=0.05, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_the_loss_of_a_fresh_network_is_known(rows, kind):
    """Untrained heads are uniform, or predict the mean: every term has a closed expectation."""
    program = LatentDiffusion.build("abcdef", 6, **SHAPE, **KINDS[kind])
    objective = LatentObjective(
        program, steps=10, learning=0.0, mixed=0.0, withheld=0.0, latent_rows=0.5, cap=math.inf
    )
    program.denoiser.encoder.scale(program.denoiser.encoder.raw(rows), learn=True)
    losses = torch.stack([objective.loss(rows, 0) for _ in range(600)])
    tokens = 6 * math.log(6)  # each is hidden with probability t and weighs 1 / t
    latent = 2 * math.log(4)
    if kind == "vectors":
        gain = program.latent_process.snr(0.0) - program.latent_process.snr(1.0)
        known = program.denoiser.encode(rows).double()
        latent = 0.5 * gain * float(known.square().flatten(1).sum(1).mean())
    error = float(losses.std()) / len(losses) ** 0.5
    # Five standard errors: false alarm 6e-7.
    assert abs(float(losses.mean()) - tokens - latent) < 5 * error
    assert error < 0.04 * (tokens + latent)


def test_a_constant_latent_costs_what_it_is_worth(rows):
    """An encoder that says nothing says 0, which is no easier to predict than the prior's mean."""
    objective = make("vectors")
    encoder = objective.network.encoder
    with torch.no_grad():
        encoder.output.weight.zero_()
    vectors = encoder.scale(encoder.raw(rows), learn=True)
    assert vectors.abs().max() < 1e-2
    with torch.no_grad():  # an encoder that shrinks is scaled back
        encoder.output.weight.normal_(0.0, 0.05)
    small = encoder.scale(encoder.raw(rows), learn=True)
    torch.testing.assert_close(small.var(0, correction=0), torch.ones(2, 4), atol=0.2, rtol=0)


def test_phases_have_their_shares_and_strata():
    shares = {"finished": 0.5, "mixed": 0.2, "withheld": 0.1, "latent": 0.2}
    phases = draw_phases(torch.zeros(50, 3), shares)
    assert phases.for_tokens.tolist() == [True] * 40 + [False] * 10
    assert phases.for_latent.tolist() == [False] * 25 + [True] * 10 + [False] * 5 + [True] * 10
    assert phases.withheld.sum() == 5
    assert torch.all(phases.latent[:25] == 0)
    assert torch.all(phases.latent[35:40] == 1)
    assert torch.all(phases.tokens[40:] == 1)
    places = (phases.tokens[:25] * 25).floor().sort().values
    assert torch.equal(places, torch.arange(25.0, dtype=torch.float64))


def test_withheld_rows_read_nothing_of_the_sequence(rows):
    """The gradient of such rows does not reach the encoder, continuous latents included."""
    for kind in KINDS:
        objective = make(kind, mixed=0.0, withheld=1.0, quantiser=
                         {"commitment": 0.0} if kind == "codes" else None)  # fmt: skip
        grads = gradients(objective, rows, 0)
        assert float(grads["encoder.output.weight"].abs().max()) == 0.0


@pytest.mark.parametrize("option", ["shrink", "contrast", "independence"])
@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_options_add_to_the_loss(rows, option, kind):
    objective = make(kind)
    torch.manual_seed(3)
    plain = objective.loss(rows, 0)
    setattr(objective, option, 0.5)
    torch.manual_seed(3)
    assert float(objective.loss(rows, 0).detach()) > float(plain.detach())


def test_the_weight_waits_and_grows():
    objective = make(steps=100, learning=0.2, delay=0.25, ramp=0.5, latent_weight=2.0)
    weights = [objective._weight(step) for step in (0, 19, 39, 60, 80, 100)]
    assert weights == pytest.approx([0.0, 0.0, 0.0, 1.0, 2.0, 2.0])


def test_hidden_tokens_are_hidden_from_the_encoder(rows):
    objective = make(hide=1.0)
    hidden = torch.zeros_like(rows, dtype=torch.bool)
    hidden[:, :3] = True
    visible = objective._visible(rows, hidden)
    assert visible[:, 3:].all()
    share = float((~visible[:, :3]).double().mean())
    assert 0.3 < share < 0.7  # 180 draws around 1/2 that share 60 levels: 4 standard errors
    changed = rows.clone()
    changed[:, :3] = 5 - changed[:, :3]
    encoder = objective.network.encoder
    torch.testing.assert_close(encoder.raw(rows, ~hidden), encoder.raw(changed, ~hidden))
    assert not torch.allclose(encoder.raw(rows), encoder.raw(changed))


def test_the_weight_of_an_error_is_the_slope_of_the_signal_to_noise_ratio():
    process = Gaussian()
    u = torch.linspace(0.0, 0.999, 4001, dtype=torch.float64)
    weight = squared_error_weight(process, u)
    total = torch.trapezoid(weight, u)
    assert float(total) == pytest.approx(0.5 * (process.snr(0.0) - process.snr(0.999)), rel=1e-3)


def test_wrong_requests_are_refused():
    program = LatentDiffusion.build("abcdef", 6, **SHAPE, num_codes=4)
    with pytest.raises(ValueError, match=r"latent: withheld must lie in \[0, 1\], got 2"):
        LatentObjective(program, steps=1, withheld=2.0)
    with pytest.raises(ValueError, match="mixed and withheld are shares of the same rows"):
        LatentObjective(program, steps=1, withheld=0.6, mixed=0.6)
    with pytest.raises(ValueError, match="this is no prior with a latent of its own network"):
        LatentObjective(SimpleNamespace(denoiser=None), steps=1)
