"""Philox against the published vectors, and the words that sampling takes from it."""

import numpy as np
import pytest

from polymux.kernels.philox import draw_words, philox

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(counter: str, key: str, result: str) -> None:
    block = philox(np.array(_words(counter), np.uint64)[:, None], np.array(_words(key), np.uint64)[:, None])
    assert block[:, 0].tolist() == _words(result)


def test_a_word_is_the_first_two_of_the_block_of_its_seed_and_index() -> None:
    seed, index = 0x299F31D0_A4093822, 0x85A308D3_243F6A88
    counter = np.array([[0x243F6A88], [0x85A308D3], [0], [0]], np.uint64)
    first, second, _, _ = philox(counter, np.array([[0xA4093822], [0x299F31D0]], np.uint64))[:, 0].tolist()
    assert draw_words([seed], [index]) == [first << 32 | second]


def test_a_word_does_not_depend_on_its_neighbours() -> None:
    together = draw_words([7, 8, 7], [0, 0, 3])
    assert together == [draw_words([7], [0])[0], draw_words([8], [0])[0], draw_words([7], [3])[0]]


def test_seeds_count_modulo_two_to_the_64() -> None:
    assert draw_words([-1], [5]) == draw_words([2**64 - 1], [5])
    assert draw_words([2**64 + 3], [5]) == draw_words([3], [5])


def test_purposes_are_separate_streams() -> None:
    assert draw_words([1], [2], purpose=0) != draw_words([1], [2], purpose=1)


def test_words_fill_their_range_evenly() -> None:
    words = np.array(draw_words([11] * 4096, range(4096)), dtype=np.float64) / 2.0**64
    counts = np.histogram(words, bins=16, range=(0, 1))[0]
    chi_square = float(((counts - 256) ** 2 / 256).sum())
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001
