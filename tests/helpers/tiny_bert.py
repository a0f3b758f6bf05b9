"""A tiny random BERT over four letters, or other words, and its tokeniser as a folder."""

import torch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "T", "G", "C", "A"]


def tiny_bert(library, kind, **options):
    """Return a model with random weights.

    :param library: the module `transformers`.
    :param kind: name of the class, such as `"BertModel"`.
    :param options: of its configuration, over those of a tiny one.
    """
    tiny = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 12,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(library, kind)(library.BertConfig(**{**tiny, **options}))


def save_tiny_bert(library, folder, model, words=WORDS):
    """Write a model and its tokeniser, and return the folder."""
    vocabulary = {word: i for i, word in enumerate(words)}
    library.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def save_tiny_esm(library, folder):
    """Write a model of proteins with its tokeniser, which ends a sequence with `<eos>`."""
    words = ["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "G", "V", "<mask>"]
    (folder / "letters.txt").write_text("\n".join(words), encoding="utf-8")
    library.EsmTokenizer(str(folder / "letters.txt")).save_pretrained(folder)
    config = library.EsmConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        pad_token_id=1,
        mask_token_id=8,
    )
    library.EsmForMaskedLM(config).save_pretrained(folder)
    return folder
