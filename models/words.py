"""Tokens of several characters as text: words, and the pieces that continue them."""

from __future__ import annotations

from collections.abc import Container, Sequence

PIECE = "##"
"""What WordPiece writes before a token that continues a word."""


def are_words(vocabulary: Sequence[str]) -> bool:
    """Return whether tokens are words to be parted by spaces: some have several characters.

    A vocabulary with white space of its own needs no other.
    """
    spaced = any(token.split() != [token] for token in vocabulary)
    return not spaced and any(len(token) > 1 for token in vocabulary)


def split_word(word: str, known: Container[str]) -> list[str]:
    """Return the tokens of a word, the longest first; the word itself where it has none.

    :param known: the tokens; one that continues a word is written ``##piece``.
    """
    pieces: list[str] = []
    start = 0
    while start < len(word):
        mark = PIECE if start else ""
        ends = range(len(word), start, -1)
        found = next((end for end in ends if mark + word[start:end] in known), None)
        if found is None:
            return [word]
        pieces.append(mark + word[start:found])
        start = found
    return pieces


def join_tokens(tokens: Sequence[str], separator: str) -> str:
    """Return tokens as text; where they are words, pieces continue what stands before them."""
    if not separator:
        return "".join(tokens)
    parts = [
        token.removeprefix(PIECE) if _continues(token) else separator + token
        for token in tokens[1:]
    ]
    return "".join([*tokens[:1], *parts])


def _continues(token: str) -> bool:
    return token.startswith(PIECE) and len(token) > len(PIECE)
