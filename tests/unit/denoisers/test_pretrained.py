"""Masked language models of other people as denoisers, on a tiny random BERT."""

import pytest
import torch
from tiny_bert import save_tiny_bert, save_tiny_esm, tiny_bert

from ppl_diffusion.denoisers import MaskedLanguageModel
from ppl_diffusion.denoisers.pretrained import frame
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.testing import DenoiserContract

transformers = pytest.importorskip("transformers")

LETTERS = "ACGT"


def model():
    return tiny_bert(transformers, "BertForMaskedLM", initializer_range=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_bert(transformers, tmp_path_factory.mktemp("bert"), model())


class TestMaskedLanguageModel(DenoiserContract):
    def make_process(self):
        return Absorbing(4)

    def make_denoiser(self, process):
        return MaskedLanguageModel(model(), [8, 7, 6, 5], 4, before=[2], after=[3])


def test_at_a_mask_it_is_the_model_s_law_of_our_tokens(folder):
    denoiser = MaskedLanguageModel.from_pretrained(folder, LETTERS, local_files_only=True)
    tokens = torch.tensor([[0, 4, 2], [4, 4, 3]])
    ids = torch.tensor([8, 7, 6, 5, 4])[tokens]
    whole = torch.cat([torch.full((2, 1), 2), ids, torch.full((2, 1), 3)], 1)
    logits = denoiser.model(input_ids=whole).logits[:, 1:-1, [8, 7, 6, 5]]
    torch.testing.assert_close(denoiser(tokens, 0.5), logits.log_softmax(-1))


def test_a_chain_around_it_keeps_a_prompt(folder):
    denoiser = MaskedLanguageModel.from_pretrained(folder, LETTERS, local_files_only=True)
    kernel = InterpolatingKernel(Absorbing(4), denoiser, num_steps=4)
    chain = ReverseChain(kernel, 5, prompt=torch.tensor([-1, 2, -1, -1, 0]))
    rows = chain.x0(chain.sample((8,)))
    assert bool((rows[:, 1] == 2).all())
    assert bool((rows[:, 4] == 0).all())


def test_another_vocabulary_is_refused_in_a_sentence(folder):
    with pytest.raises(ValueError, match="MaskedLanguageModel: 'U' is no token of the model"):
        MaskedLanguageModel.from_pretrained(folder, "ACGU", local_files_only=True)
    with pytest.raises(ValueError, match="the model has the ids 0 to 8, but ours include 9"):
        MaskedLanguageModel(model(), [8, 9], 4)
    with pytest.raises(ValueError, match="or one and the mask, have the id 4 of the model"):
        MaskedLanguageModel(model(), [8, 4], 4)


def test_a_sequence_is_framed_as_its_tokeniser_frames_it(folder, tmp_path):
    esm = save_tiny_esm(transformers, tmp_path)
    denoiser = MaskedLanguageModel.from_pretrained(esm, "LAGV", local_files_only=True)
    assert (denoiser.before, denoiser.after) == ((0,), (2,))
    denoiser = MaskedLanguageModel.from_pretrained(folder, LETTERS, local_files_only=True)
    assert (denoiser.before, denoiser.after) == ((2,), (3,))


def test_the_frame_of_a_tokeniser_of_few_letters_is_found():
    library = pytest.importorskip("tokenizers")
    letters = {"[CLS]": 0, "[END]": 1, "[MASK]": 2, "A": 3, "C": 4}
    inner = library.Tokenizer(library.models.WordLevel(letters))
    inner.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A [END]", special_tokens=[("[CLS]", 0), ("[END]", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, mask_token="[MASK]", cls_token="[CLS]", eos_token="[END]"
    )
    assert frame(tokenizer) == ([0], [1])


def test_the_end_is_that_of_sequences_where_there_is_no_separator():
    class Bare:
        cls_token_id, sep_token_id, eos_token_id = 0, None, 2

    assert frame(Bare()) == ([0], [2])


def test_a_model_of_another_kind_is_refused(tmp_path):
    other = tiny_bert(transformers, "BertForSequenceClassification")
    folder = save_tiny_bert(transformers, tmp_path, other)
    with pytest.raises(ValueError, match=r"MaskedLanguageModel: .* has no weights for 'cls.pred"):
        MaskedLanguageModel.from_pretrained(folder, LETTERS, local_files_only=True)


def test_the_tokeniser_is_looked_for_where_the_model_is(tmp_path):
    save_tiny_bert(transformers, tmp_path / "inside", model())
    denoiser = MaskedLanguageModel.from_pretrained(tmp_path, LETTERS, subfolder="inside")
    assert denoiser.ids.tolist() == [8, 7, 6, 5, 4]


def test_a_sequence_beyond_the_positions_is_refused_in_a_sentence(folder):
    denoiser = MaskedLanguageModel.from_pretrained(folder, LETTERS, local_files_only=True)
    assert denoiser(torch.full((10,), 4), 0.5).shape == (10, 4)
    with pytest.raises(ValueError, match="positions for 12; give at most 10 tokens"):
        denoiser(torch.full((11,), 4), 0.5)


def test_positions_behind_the_padding_alone_are_counted(tmp_path):
    esm = save_tiny_esm(transformers, tmp_path)
    denoiser = MaskedLanguageModel.from_pretrained(esm, "LAGV", local_files_only=True)
    assert denoiser(torch.full((8,), 4), 0.5).shape == (8, 4)
    with pytest.raises(ValueError, match="positions for 10; give at most 8 tokens"):
        denoiser(torch.full((9,), 4), 0.5)
