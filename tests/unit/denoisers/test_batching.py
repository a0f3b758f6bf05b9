"""Rows per call: read off the machine, told by networks, passed on by wrappers."""

import math

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser, batching
from ppl_diffusion.denoisers.batching import rows_per_call, rows_that_fit
from ppl_diffusion.denoisers.conditional import Guided, Labelled
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.filters import Temperature
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.testing import toy_markov_chain

CPU = torch.device("cpu")


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr(batching, "cache_bytes", lambda: 2**16)
    monkeypatch.setattr(batching, "_FEWEST_TOKENS", 1)


def network(**shape):
    shape = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, **shape}
    return Transformer(TransformerConfig(4, 5, 8, **shape)).eval()


@pytest.mark.parametrize(("cache", "rows"), [(2**25, 128), (2**30, 256), (2**10, 32)])
def test_a_quarter_of_the_cache_is_filled_within_bounds(monkeypatch, cache, rows):
    """From 16 MB a tensor on nothing is gained; below 2048 tokens the fixed costs show."""
    monkeypatch.setattr(batching, "cache_bytes", lambda: cache)
    assert rows_that_fit(2**16, 64, CPU) == rows


def test_an_accelerator_gets_what_its_memory_holds(monkeypatch):
    monkeypatch.setattr(batching, "_memory_bytes", lambda device: 2**36)
    assert rows_that_fit(2**20, 64, torch.device("cuda")) == 2**11
    monkeypatch.setattr(batching, "_memory_bytes", lambda device: None)
    assert rows_that_fit(2**20, 64, torch.device("mps")) == batching.MANY


@pytest.mark.parametrize(("text", "size"), [("32K\n", 2**15), ("1M", 2**20), ("4096", 4096)])
def test_cache_sizes_are_read(monkeypatch, tmp_path, text, size):
    (tmp_path / "index3").mkdir()
    (tmp_path / "index3" / "size").write_text(text)
    monkeypatch.setattr(batching, "_CACHES", tmp_path)
    assert batching.cache_bytes.__wrapped__() == size
    monkeypatch.setattr(batching, "_CACHES", tmp_path / "absent")
    assert batching.cache_bytes.__wrapped__() == 2**24


@pytest.mark.parametrize("content", [b"", b"unknown", b"512KB", b"K", b"\xff", None])
def test_a_cache_of_no_known_size_is_passed_over(monkeypatch, tmp_path, content):
    monkeypatch.setattr(batching, "_CACHES", tmp_path)
    size = tmp_path / "index3" / "size"
    size.parent.mkdir()
    size.mkdir() if content is None else size.write_bytes(content)
    assert batching.cache_bytes.__wrapped__() == 2**24
    (tmp_path / "index2").mkdir()
    (tmp_path / "index2" / "size").write_text("64K")
    assert batching.cache_bytes.__wrapped__() == 2**16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_without_tokens_have_a_number_too(monkeypatch, device):
    monkeypatch.setattr(batching, "_memory_bytes", lambda device: 2**30)
    assert rows_that_fit(0, 0, torch.device(device)) >= 1
    assert network().rows_per_call(0) >= 1


def test_wrappers_pass_it_on(small_cache):
    inner = network()
    expected = inner.rows_per_call(8)
    assert expected == 2**14 // (3 * 16 * 8 * 4)
    assert rows_per_call(Temperature(inner, 0.5), 8) == expected
    classes = network(num_classes=2)
    assert rows_per_call(Labelled(classes, 1), 8) == expected
    both = Guided(Labelled(classes, 1), Labelled(classes, None), 2.0)
    assert rows_per_call(both, 8) == expected // 2


def test_of_unknown_denoisers_many_rows_are_asked():
    denoiser = toy_markov_chain().kernel.denoiser
    assert rows_per_call(denoiser, 5) == batching.MANY
    # It cuts up what it is given itself: its own callers must not.
    assert rows_per_call(EvaluatedDenoiser(network()), 8) == batching.MANY


def seen(asked):
    sizes = []
    asked.stem.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize(("max_rows", "largest"), [(None, 10), (3, 3), (64, 64)])
def test_evaluation_asks_what_suits_or_what_it_is_told(small_cache, max_rows, largest):
    inner = network()
    sizes = seen(inner)
    states = torch.cartesian_prod(*[torch.arange(3)] * 8)[:64]
    with torch.no_grad():
        EvaluatedDenoiser(inner, max_rows=max_rows)(states, 0.5)
    assert max(sizes) == largest
    assert len(sizes) == math.ceil(64 / largest)


@pytest.mark.parametrize("method", ["sample", "log_prob"])
def test_chains_on_event_times_ask_what_suits(small_cache, method):
    inner = network()
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    kernel = InterpolatingKernel(Absorbing(4), inner, num_steps=4)
    chain = ReverseChain(kernel, length=8)
    paths = chain.sample((33,))

    def result():
        torch.manual_seed(1)
        return chain.sample((33,)) if method == "sample" else chain.log_prob(paths.clone())

    sizes = seen(inner)
    parts = result()
    assert max(sizes) == 10
    inner.rows_per_call = lambda length: 1000
    whole = result()
    assert max(sizes) > 30
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
