"""The words that the model of shapes reads, as a CLIP tokenizer's vocabulary.

Byte pair encoding whose merges are these words, letter by letter from the front: a known word is one token, an unknown one falls into the
beginnings of known ones and letters. What is no letter of a to z is the end token, as CLIP has it for the unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase

from runtimes.diffusers.shapes.draw import COLOURS, GROUNDS, SHAPES

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
TOKENS_MAX = 24  # of a prompt, with begin and end
_WORDS = ("a", "an", "on", "the", "of", "in", "and", "with", "ground", "background", "picture", "gray", "violet")


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in their order."""
    merges = list(dict.fromkeys(_merges([*_WORDS, *SHAPES, *COLOURS, *GROUNDS])))
    letters = [*ascii_lowercase, *(letter + WORD_END for letter in ascii_lowercase)]
    tokens = [*letters, *dict.fromkeys(first + second for first, second in merges), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _merges(words: Iterable[str]) -> Iterable[tuple[str, str]]:
    for word in words:
        pieces = [*word[:-1], word[-1] + WORD_END]
        known = pieces[0]
        for piece in pieces[1:]:
            yield known, piece
            known += piece
