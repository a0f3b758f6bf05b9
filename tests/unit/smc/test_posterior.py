"""The result object: averages, draws, files, refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ppl_diffusion.diagnostics import summary, summary_table, to_arviz
from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, run_smc
from ppl_diffusion.smc.genealogy import evidence_variance
from ppl_diffusion.smc.posterior_files import ARRAYS_FILE, META_FILE
from ppl_diffusion.smc.run_statistics import effective_distinct
from ppl_diffusion.testing import toy_markov_chain, toy_potential, z_score

SCHEMES = ("systematic", "multinomial")
NEVER = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf))


def posterior(potential=None, runs=4, n=32, name="uniform", ess_threshold=0.8, **options):
    fk = FeynmanKac(toy_markov_chain(name), potential or toy_potential(length=5, scale=1.5))
    generator = torch.Generator().manual_seed(0)
    return run_smc(fk, n, runs, generator=generator, ess_threshold=ess_threshold, **options)


def half_dead():
    """One dead run among living ones, by hand."""
    post = posterior()
    log_weights, log_evidence = post.log_weights.clone(), post.log_evidence.clone()
    log_weights[1], log_evidence[1] = -torch.inf, -torch.inf
    died_at = torch.tensor([-1, 3, -1, -1])
    return dataclasses.replace(
        post, log_weights=log_weights, log_evidence=log_evidence, died_at=died_at
    )


def assert_same_bits(here, there):
    for item in dataclasses.fields(ParticlePosterior):
        a, b = getattr(here, item.name), getattr(there, item.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, item.name
            assert a.shape == b.shape, item.name
            as_bytes = [x.contiguous().view(torch.uint8) for x in (a, b)]
            assert torch.equal(*as_bytes), item.name
        elif item.name == "samples":
            assert list(a) == list(b)
            assert all(torch.equal(a[key], b[key]) for key in a)
        elif item.name == "origin":
            assert b is None
        elif isinstance(a, float) and math.isnan(a):
            assert math.isnan(b)
        else:
            assert a == b, item.name
            assert type(a) is type(b) or item.name == "settings", item.name


@pytest.mark.parametrize("store_path", [True, False])
@pytest.mark.parametrize("potential", [None, NEVER], ids=["alive", "dead"])
def test_round_trip_bit_for_bit(tmp_path, store_path, potential):
    post = posterior(potential, store_path=store_path)
    assert post.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert_same_bits(post, ParticlePosterior.load(tmp_path / "a" / "b"))


def test_round_trip_of_a_program(tmp_path):
    """Sites of any shape and type, names with dots, NaN seconds, nested settings."""
    post = posterior()
    samples = {
        "x0": post.x0,
        "gain": torch.randn(4, 32),
        "plate.site": torch.randn(4, 32, 3, dtype=torch.float64),
        "flag": torch.rand(4, 32) > 0.5,
    }
    settings = {"a": {"b": [1, 2.5, None]}, "seed": 3}
    program = dataclasses.replace(
        post, samples=samples, settings=settings, seconds=math.nan, is_program=True
    )
    program.save(tmp_path)
    assert_same_bits(program, ParticlePosterior.load(tmp_path))


def test_saving_twice_gives_the_same_files(tmp_path):
    post = posterior()
    texts = []
    for name in ("a", "b"):
        post.save(tmp_path / name)
        texts.append([(tmp_path / name / f).read_bytes() for f in (ARRAYS_FILE, META_FILE)])
    assert texts[0] == texts[1]


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no particle posterior"):
        ParticlePosterior.load(tmp_path)
    posterior().save(tmp_path)
    meta = (tmp_path / META_FILE).read_text()
    (tmp_path / META_FILE).write_text(meta[:40])
    with pytest.raises(ValueError, match="damaged particle posterior"):
        ParticlePosterior.load(tmp_path)
    (tmp_path / META_FILE).write_text(json.dumps({**json.loads(meta), "format": 99}))
    with pytest.raises(ValueError, match="another format"):
        ParticlePosterior.load(tmp_path)
    (tmp_path / META_FILE).write_text(meta)
    (tmp_path / ARRAYS_FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged particle posterior"):
        ParticlePosterior.load(tmp_path)


def rewrite_meta(folder, change):
    file = folder / META_FILE
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(change(meta)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda meta: {k: v for k, v in meta.items() if k != "law"}, "json lacks 'law';"),
        (lambda meta: meta | {"colour": "red"}, "json has unknown 'colour';"),
        (lambda meta: meta | {"x0": [1]}, "json has unknown 'x0';"),
        (lambda meta: [meta], "json holds no JSON object;"),
        (lambda meta: meta | {"sites": None}, "'sites' in particles.json is no list;"),
        (lambda meta: meta | {"sites": ["y"]}, "safetensors lacks 'samples.y';"),
        (lambda meta: meta | {"sites": []}, "safetensors has unknown 'samples.x0';"),
    ],
)
def test_unexpected_metadata_is_refused_in_one_sentence(tmp_path, change, sentence):
    posterior().save(tmp_path)
    rewrite_meta(tmp_path, change)
    with pytest.raises(ValueError, match=sentence) as caught:
        ParticlePosterior.load(tmp_path)
    assert "damaged particle posterior" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unexpected_arrays_are_refused(tmp_path):
    posterior(store_path=False).save(tmp_path)
    arrays = load_file(tmp_path / ARRAYS_FILE)
    save_file({k: v for k, v in arrays.items() if k != "eve"}, tmp_path / ARRAYS_FILE)
    with pytest.raises(ValueError, match="safetensors lacks 'eve'"):
        ParticlePosterior.load(tmp_path)
    save_file({**arrays, "adam": torch.ones(1)}, tmp_path / ARRAYS_FILE)
    with pytest.raises(ValueError, match="safetensors has unknown 'adam'"):
        ParticlePosterior.load(tmp_path)


def test_settings_of_any_type_are_saved_in_json_types(tmp_path):
    settings = {
        "seed": np.int64(3),
        "share": np.float32(0.5),
        "lazy": np.bool_(True),
        "grid": (np.arange(2), torch.tensor([0.25])),
        "by_step": {np.int64(4): torch.tensor(1)},
        "kind": torch.float64,
    }
    calls = np.int64(7)
    dataclasses.replace(posterior(), settings=settings, num_potential_calls=calls).save(tmp_path)
    loaded = ParticlePosterior.load(tmp_path)
    assert loaded.num_potential_calls == 7
    assert loaded.settings == {
        "seed": 3,
        "share": 0.5,
        "lazy": True,
        "grid": [[0, 1], [0.25]],
        "by_step": {"4": 1},
        "kind": "torch.float64",
    }


def test_expectation_by_hand():
    post = posterior()
    expected = (post.weights[..., None] * (post.x0 == 1)).sum(1)
    torch.testing.assert_close(post.expectation(lambda x0: x0 == 1), expected)
    ones = post.expectation(lambda x0: torch.ones(4, 32))
    torch.testing.assert_close(ones, torch.ones(4).double())


def test_expectation_of_a_program_sees_its_sites():
    post = dataclasses.replace(
        posterior(), samples={"gain": torch.arange(4.0)[:, None].expand(4, 32)}, is_program=True
    )
    torch.testing.assert_close(post.expectation(lambda s: s["gain"]), torch.arange(4).double())


def test_expectation_needs_one_value_per_particle():
    with pytest.raises(ValueError, match=r"start with \(runs, draws\) = \(4, 32\)"):
        posterior().expectation(lambda x0: x0.sum())


def test_zero_weight_silences_infinity():
    post = posterior(Potential(lambda x0: torch.where(x0[..., 0] == 0, 0.0, -torch.inf)))
    mean = post.expectation(lambda x0: torch.where(x0[..., 0] == 0, 2.0, torch.inf))
    torch.testing.assert_close(mean, torch.full((4,), 2.0).double())


def test_dead_runs_know_nothing_and_count_as_zero():
    post = half_dead()
    mean = post.expectation(lambda x0: x0)
    assert bool(torch.isnan(mean[1]).all())
    assert bool(torch.isfinite(mean[[0, 2, 3]]).all())
    assert post.alive.tolist() == [True, False, True, True]
    expected = math.log(float(post.log_evidence.exp().mean()))
    assert post.pooled_log_evidence == pytest.approx(expected)
    pooled = post.pooled_log_weights
    assert float(torch.logsumexp(pooled.flatten(), 0)) == pytest.approx(0, abs=1e-12)
    assert bool((pooled[1] == -torch.inf).all())
    assert post.resample(5, pooled=False)["x0"].shape == (3, 5, 5)
    assert not bool((post.resample(2000)["index"] // 32 == 1).any())


def test_all_dead_is_an_error_with_advice():
    post = posterior(NEVER)
    for use in (
        lambda: post.expectation(lambda x0: x0),
        lambda: post.resample(3),
        lambda: post.pooled_log_weights,
    ):
        with pytest.raises(ParticleCollapse, match=r"died at steps \[3\].*use more particles"):
            use()
    assert post.pooled_log_evidence == -math.inf


@pytest.mark.parametrize("pooled", [True, False])
def test_resample_is_unbiased(pooled):
    """Counts against weights, 4 s.e. in 16 cells: false alarm rate 1e-3, once."""
    post = posterior(runs=2, n=8)
    weights = post.pooled_log_weights.exp() if pooled else post.weights
    generator = torch.Generator().manual_seed(1)
    draws = [post.resample(4, pooled=pooled, generator=generator)["index"] for _ in range(4000)]
    counts = torch.stack([torch.bincount(d.flatten(), minlength=16) / 4 for d in draws])
    for cell, weight in enumerate(weights.flatten().tolist()):
        if counts[:, cell].std() > 0:
            assert abs(z_score(counts[:, cell].double(), weight)) < 4
        else:
            assert weight in (0, pytest.approx(float(counts[0, cell]), abs=1e-9))


def test_resample_returns_sites_and_positions():
    post = posterior()
    drawn = post.resample(7)
    assert set(drawn) == {"x0", "index"}
    assert torch.equal(drawn["x0"], post.x0.flatten(0, 1)[drawn["index"]])
    with pytest.raises(ValueError, match="num must be a whole number >= 1, got 0"):
        post.resample(0)


def test_resample_leaves_the_sites_of_a_program_alone():
    post = posterior()
    samples = {"x0": torch.randn(4, 32), "index": torch.randn(4, 32, 2), "key": torch.arange(128)}
    samples["key"] = samples["key"].reshape(4, 32)
    drawn = dataclasses.replace(post, samples=samples, is_program=True).resample(9)
    assert set(drawn) == set(samples)
    for name, value in samples.items():
        assert torch.equal(drawn[name], value.flatten(0, 1)[drawn["key"]]), name


def test_resample_order_is_random():
    """Stratified indices come sorted; draws must be exchangeable."""
    index = posterior().resample(200)["index"]
    assert bool((index[1:] < index[:-1]).any())


def test_posterior_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        posterior().x0 = None


def test_path_is_stored_compactly():
    post = posterior()
    assert post.compact_path.dtype == torch.uint8
    assert post.path.dtype == torch.int64


def test_genealogy_of_each_run():
    post = posterior()
    for run in range(4):
        graph = post.genealogy(run)
        assert graph.number_of_nodes() == 32 * 5
        roots = {graph.nodes[4, n]["eve"] for n in range(32)}
        assert roots == set(post.eve[run].tolist())
        total = sum(graph.nodes[4, n]["weight"] for n in range(32))
        assert total == pytest.approx(1)
    with pytest.raises(ValueError, match=r"run must lie in 0\.\.3, got 4"):
        post.genealogy(4)


def test_the_tree_tells_a_variance_under_multinomial_resampling_only():
    """Under systematic resampling the formula takes off more than there is: negative, or far low.

    Never resampled draws are independent whatever the scheme, and told right by either.
    """
    always = [posterior(n=8, runs=200, ess_threshold=2.0, resampler=s) for s in SCHEMES]
    systematic, multinomial = always
    assert bool(systematic.evidence_variance.isnan().all())
    told = multinomial.evidence_variance
    roots = effective_distinct(multinomial.eve.numpy(), multinomial.weights.numpy())
    raw = evidence_variance(multinomial.eve, multinomial.weights, multinomial.resampled)
    known = torch.as_tensor(roots >= 2) & (raw > 0)
    assert 0 < int(known.sum()) < 200
    assert torch.equal(~told.isnan(), known)
    assert torch.equal(told[known], raw[known])
    apart = [posterior(ess_threshold=0.0, resampler=scheme) for scheme in SCHEMES]
    assert all(bool((one.evidence_variance > 0).all()) for one in apart)


def test_repr():
    assert "4 runs x 32 particles, 4 steps" in repr(posterior())


def without_evidence():
    """One dead run among living ones of a method that estimates no evidence."""
    post = half_dead()
    unknown = torch.where(post.alive, torch.nan, -torch.inf).double()
    steps = unknown[:, None].expand_as(post.log_evidence_steps).clone()
    settings = {**post.settings, "method": "best-of-n"}
    return dataclasses.replace(
        post,
        log_evidence=unknown,
        log_evidence_steps=steps,
        settings=settings,
        law=post.law.but(exact=False, has_evidence=False),
    )


def test_runs_without_evidence_count_alike():
    post = without_evidence()
    assert math.isnan(post.pooled_log_evidence)
    shares = post.pooled_log_weights.exp().sum(-1)
    torch.testing.assert_close(shares, torch.tensor([1, 0, 1, 1]).double() / 3)
    generator = torch.Generator().manual_seed(0)
    run = post.resample(3000, generator=generator)["index"] // post.num_particles
    counts = torch.bincount(run, minlength=4)
    assert bool(((counts - torch.tensor([1000, 0, 1000, 1000])).abs() <= 1).all())  # stratified


def test_no_evidence_is_reported_as_none(tmp_path):
    post = without_evidence()
    figures = summary(post)
    assert figures["log_evidence"] is None
    assert figures["log_evidence_per_run"] == [None] * 4
    assert figures["ess"] > 3
    quantities = list(summary_table(post).columns[1].cells)
    assert "none" in map(str, quantities)
    assert post.evidence is None
    assert "log_evidence=none" in repr(post)
    assert bool(np.isnan(to_arviz(post).smc["total_log_evidence"].values[[0, 2, 3]]).all())
    assert_same_bits(post, ParticlePosterior.load(post.save(tmp_path)))
