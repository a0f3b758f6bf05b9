"""Expression oracles: interface, files, halves, metrics; the shipped ones against their cards."""

import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
from scipy import special
from typer.testing import CliRunner

from ppl_diffusion.models import list_oracles, load_oracle, read_card
from ppl_diffusion.models.oracle_evaluation import (
    Promoters,
    assign_halves,
    evaluate_oracle,
    evaluate_predictor,
    load_promoters,
    ridge,
)
from ppl_diffusion.models.oracle_training import (
    Recipe,
    app,
    calibrate,
    fit,
)
from ppl_diffusion.models.oracles import Oracle, OracleConfig, one_hot

SHIPPED = ("yeast-oracle-design", "yeast-oracle-judge")
SMALL = OracleConfig(filters=4, channels=4, hidden=8, dilations=(1, 2), kmer=3, centre=9.0)


def sequences(count=20, seed=0):
    return torch.randint(4, (count, 80), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def oracle():
    torch.manual_seed(0)
    oracle = Oracle(SMALL)
    oracle.linear.weight.normal_()
    oracle.linear.bias.fill_(0.25)
    return oracle


def promoters(count, seed=0):
    """Rows whose expression is the share of G plus noise; families of four consecutive rows."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 4, (count, 80))
    y = 9.0 + 40.0 * ((x == 2).mean(-1) - 0.25) + 0.5 * rng.standard_normal(count)
    family = np.arange(count) // 4
    split = rng.permutation(np.arange(count // 4 + 1) % 3)[family]
    return Promoters(x, y, y.copy(), family, family % 3, split)


class TestInterface:
    @pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (0,), (3, 0, 2)])
    def test_any_leading_shape(self, oracle, shape):
        tokens = sequences(6)[: max(math.prod(shape), 0)].reshape(*shape, 80)
        mean, sd = oracle.predict(tokens)
        assert mean.shape == sd.shape == shape
        assert mean.dtype == sd.dtype == torch.float32
        assert bool((sd > 0).all())

    def test_a_batch_equals_one_call_per_sequence(self, oracle):
        tokens = sequences()
        single = torch.stack([oracle(row) for row in tokens])
        torch.testing.assert_close(oracle(tokens), single, rtol=0, atol=1e-4)

    def test_pieces_do_not_change_the_values(self, oracle):
        tokens = sequences()
        pieces = oracle.predict(tokens, chunk_size=3)
        torch.testing.assert_close(oracle.predict(tokens), pieces, rtol=0, atol=1e-4)

    def test_calls_are_deterministic_and_without_gradient(self, oracle):
        tokens = sequences()
        assert torch.equal(oracle(tokens), oracle(tokens))
        assert not oracle(tokens).requires_grad

    def test_the_relaxation_is_differentiable_and_agrees(self, oracle):
        tokens = sequences()
        relaxed = one_hot(tokens).requires_grad_()
        mean, sd = oracle.from_one_hot(relaxed)
        (mean.sum() + sd.sum()).backward()
        torch.testing.assert_close(mean, oracle(tokens))
        assert bool((relaxed.grad.abs().sum((1, 2)) > 0).all())

    def test_the_ensemble_is_an_equal_mixture_in_assay_units(self, oracle):
        tokens = sequences()
        x = oracle.with_flanks(one_hot(tokens))
        with torch.no_grad():
            outputs = [member(x) for member in oracle.members]
        means = torch.stack([*(o[0] for o in outputs), oracle.linear.look_up(tokens)])
        noise = torch.stack([o[1].exp() for o in outputs]).mean(0)
        mean, sd = oracle.predict(tokens)
        torch.testing.assert_close(mean, 9.0 + means.mean(0))
        torch.testing.assert_close(sd.square(), noise + means.var(0, correction=0))

    def test_the_linear_member_counts_kmers(self, oracle):
        tokens = sequences()
        texts = ["".join("ACGT"[i] for i in row) for row in tokens.tolist()]
        kmers = ["".join(p) for p in itertools.product("ACGT", repeat=3)]
        weight = dict(zip(kmers, oracle.linear.weight.tolist(), strict=True))
        expected = [sum(weight[t[i : i + 3]] for i in range(78)) + 0.25 for t in texts]
        value = oracle.linear.look_up(tokens)
        torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-5, atol=1e-5)
        relaxed = oracle.linear(one_hot(tokens))
        torch.testing.assert_close(relaxed, value, rtol=1e-5, atol=1e-5)

    def test_the_linear_member_averages_over_independent_bases(self, oracle):
        relaxed = torch.rand(2, 4, 4).softmax(-1)
        expected = torch.zeros(2)
        for bases in itertools.product(range(4), repeat=4):
            p = relaxed[:, range(4), list(bases)].prod(-1)
            expected += p * oracle.linear.look_up(torch.tensor([bases]))
        torch.testing.assert_close(oracle.linear(relaxed), expected, rtol=1e-4, atol=1e-5)

    def test_the_flanks_of_the_assay_surround_the_sequence(self, oracle):
        window = oracle.with_flanks(one_hot(sequences(1)))[0].argmax(0)
        text = "".join("ACGT"[i] for i in window)
        assert text == "ACATC" + "".join("ACGT"[i] for i in sequences(1)[0]) + "GGTTAC"
        shifted = oracle.with_flanks(one_hot(sequences(1)), -2)[0].argmax(0)
        assert torch.equal(shifted[2:], window[:-2])

    def test_the_first_layer_reads_both_strands_alike(self, oracle):
        member = oracle.members[0]
        x = oracle.with_flanks(one_hot(sequences(3)))
        forward, reverse = member._scan_strands(x).chunk(2, 1)
        other_strand = member._scan_strands(x.flip(1, 2)).chunk(2, 1)[0].flip(-1)
        torch.testing.assert_close(reverse, other_strand)
        assert not torch.allclose(forward, reverse)

    @pytest.mark.parametrize(
        "tokens", [torch.zeros(3, 79).long(), torch.zeros(3, 80), torch.tensor(1)]
    )
    def test_wrong_lengths_and_types_are_one_sentence(self, oracle, tokens):
        with pytest.raises(ValueError, match=r"reads int64 tokens of shape \(\*batch, 80\), but"):
            oracle(tokens)

    @pytest.mark.parametrize("token", [-1, 4])
    def test_tokens_out_of_range_are_one_sentence(self, oracle, token):
        with pytest.raises(ValueError, match="reads bases 0 to 3, but it was given tokens from"):
            oracle(torch.full((1, 80), token))


class TestFiles:
    def test_a_round_trip_keeps_every_bit(self, oracle, tmp_path):
        oracle.save(tmp_path)
        back = Oracle.load(tmp_path)
        assert back.config == oracle.config
        for mine, theirs in zip(
            oracle.predict(sequences()), back.predict(sequences()), strict=True
        ):
            assert torch.equal(mine, theirs)

    def test_a_folder_loads_like_a_name(self, oracle, tmp_path):
        oracle.save(tmp_path)
        assert torch.equal(load_oracle(tmp_path)(sequences()), oracle(sequences()))

    def test_unknown_names_list_the_shipped_ones(self):
        with pytest.raises(ValueError, match=r"There is no oracle 'nobody': .*yeast-oracle-design"):
            load_oracle("nobody")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_missing_file_is_one_sentence(self, oracle, tmp_path, name):
        oracle.save(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"holds no oracle: {name} is missing"):
            load_oracle(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"members": 2}', '{"unknown": 1}'])
    def test_a_damaged_configuration_is_one_sentence(self, oracle, tmp_path, text):
        oracle.save(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"oracle configuration .* cannot be read"):
            load_oracle(tmp_path)

    def test_weights_of_another_shape_are_one_sentence(self, oracle, tmp_path):
        oracle.save(tmp_path)
        entries = json.loads((tmp_path / "config.json").read_text()) | {"filters": 5}
        (tmp_path / "config.json").write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=r"do not fit its config\.json"):
            load_oracle(tmp_path)

    def test_truncated_weights_are_one_sentence(self, oracle, tmp_path):
        oracle.save(tmp_path)
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:-10])
        with pytest.raises(ValueError, match=r"do not fit its config\.json"):
            load_oracle(tmp_path)


class TestHalves:
    def test_families_are_kept_together_and_rows_are_shared_out(self):
        rng = np.random.default_rng(0)
        family = rng.integers(0, 200, 3000) ** 2 // 200
        kind = family % 3
        half = assign_halves(family, kind)
        for name in np.unique(family):
            assert len(np.unique(half[family == name])) == 1
        for k in range(3):
            rows = [(half[kind == k] == h).sum() for h in (0, 1)]
            assert abs(rows[0] - rows[1]) <= np.unique(family[kind == k], return_counts=True)[1][-1]

    def test_the_rule_does_not_depend_on_the_order_of_rows(self):
        rng = np.random.default_rng(1)
        family = rng.integers(0, 50, 400)
        order = rng.permutation(400)
        half = assign_halves(family, family % 2)
        assert np.array_equal(assign_halves(family[order], family[order] % 2), half[order])

    def test_the_rule_is_the_stated_one(self):
        # The digests begin 02 (family 2), 26 (family 1), 5b (family 0); family 4 is the largest.
        family = np.array([0, 1, 2, 4, 4])
        assert assign_halves(family, np.zeros(5)).tolist() == [0, 1, 1, 0, 0]
        assert assign_halves(family[:3], np.zeros(3)).tolist() == [0, 1, 0]


class TestMetrics:
    def test_a_perfect_prediction(self):
        rows = promoters(400)
        result = evaluate_predictor(rows, rows.y)
        assert result["r"] == pytest.approx(1.0)
        assert result["rmse"] == 0
        assert (result["rows"], result["families"]) == (400, 100)

    def test_coverage_is_the_share_inside_central_intervals(self):
        rows = promoters(400)
        # standardised errors at the 400 mid-quantiles of a normal law
        z = np.sqrt(2) * special.erfinv(2 * (np.arange(400) + 0.5) / 400 - 1)
        result = evaluate_predictor(rows, rows.y - 3 * z, np.full(400, 3.0))
        assert result["coverage"] == pytest.approx([0.5, 0.8, 0.95], abs=0.005)
        assert result["z_sd"] == pytest.approx(1.0, abs=0.01)

    def test_the_interval_resamples_families_not_rows(self):
        # 100 copies of each of 8 families: as uncertain as 8 rows, far wider than 800.
        rng = np.random.default_rng(0)
        copies = np.repeat(np.arange(8), 100)
        mean, y = rng.standard_normal(8), rng.standard_normal(8)
        rows = Promoters(copies, y[copies], y[copies], copies, copies, copies)
        low, high = evaluate_predictor(rows, mean[copies])["r_interval"]
        assert high - low > 0.5

    @pytest.mark.parametrize("k", [1, 3])
    def test_the_ridge_solves_the_dense_problem(self, k):
        data = promoters(120)
        train, test = data.where(data.split == 0), data.where(data.split == 2)

        def count(x):
            kmers = np.lib.stride_tricks.sliding_window_view(x, k, axis=1) @ 4 ** np.arange(k)[::-1]
            return np.stack([np.bincount(row, minlength=4**k) for row in kmers]).astype(float)

        features, level = count(train.x), train.y.mean()
        centre = features.mean(0)
        gram = (features - centre).T @ (features - centre) + 10.0 * np.eye(4**k)
        weights = np.linalg.solve(gram, (features - centre).T @ (train.y - level))
        expected = (count(test.x) - centre) @ weights + level
        np.testing.assert_allclose(ridge(train, test, k, penalty=10.0), expected, rtol=1e-8)

    def test_calibration_gives_unit_variance(self, oracle):
        rows = promoters(400)
        mean, sd = (a.double().numpy() for a in calibrate(oracle, rows).predict(_tokens(rows)))
        assert np.mean(((rows.y - mean) / sd) ** 2) == pytest.approx(1.0, rel=1e-4)


def _tokens(rows):
    return torch.from_numpy(rows.x)


def test_fitting_learns_a_known_signal_and_repeats_itself():
    data = promoters(3000)
    recipe = Recipe(epochs=15, batch_size=64, learning_rate=1e-2)
    config = OracleConfig(members=1, filters=8, channels=8, hidden=16, dilations=(1,), kmer=2)
    first = fit(data, "design", config, recipe, progress=False)
    metrics = evaluate_oracle(first, data)["test"]
    assert metrics["r"] > 0.9  # the noise allows 0.965
    assert 0.8 < metrics["z_sd"] < 1.25
    second = fit(data, "design", config, recipe, progress=False)
    assert torch.equal(first(sequences()), second(sequences()))


def test_data_that_are_not_there_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("PPL_DIFFUSION_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="No data folder was given: pass --data"):
        load_promoters()
    with pytest.raises(FileNotFoundError, match=r"does not hold dna/yeast_promoters_80bp\.npz"):
        load_promoters(tmp_path)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["train", "--half", "both"], "There is no half 'both'"),
        (["train", "--data", "/nowhere"], "The data folder '/nowhere' does not hold"),
        (["evaluate", "nobody", "--data", "/nowhere"], "The data folder '/nowhere'"),
    ],
)
def test_bad_commands_are_one_sentence(command, text):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith(text)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", SHIPPED)
class TestShipped:
    def test_the_card_beats_the_ridge_and_is_calibrated(self, name):
        metrics = read_card(name)["metrics"]
        assert metrics["test"]["r"] > 0.826  # 6-mer ridge on all train rows
        coverage = metrics["test"]["coverage"]
        assert coverage == pytest.approx([0.5, 0.8, 0.95], abs=0.1)
        assert 0.85 < metrics["test"]["z_sd"] < 1.15

    def test_it_is_small(self, name):
        weights = sum(p.numel() * p.element_size() for p in load_oracle(name).parameters())
        assert weights < 3e6

    def test_it_predicts_within_the_range_of_the_assay(self, name):
        mean, sd = load_oracle(name).predict(sequences(200))
        assert bool(((mean > 0) & (mean < 17)).all())
        assert bool(((sd > 0.1) & (sd < 6)).all())

    @pytest.mark.data
    @pytest.mark.skipif("PPL_DIFFUSION_DATA" not in os.environ, reason="needs PPL_DIFFUSION_DATA")
    def test_the_card_tells_the_truth(self, name):
        measured = evaluate_oracle(load_oracle(name), load_promoters())
        card = read_card(name)["metrics"]
        for part in card:
            assert measured[part]["r"] == pytest.approx(card[part]["r"], abs=1e-4)
            assert measured[part]["coverage"] == pytest.approx(card[part]["coverage"], abs=2e-3)


def test_the_shipped_oracles_are_listed_and_differ():
    assert list_oracles() == list(SHIPPED)
    first, second = (load_oracle(name)(sequences(100)) for name in SHIPPED)
    assert not torch.allclose(first, second)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1] > 0.5
