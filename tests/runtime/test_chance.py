"""Draws are a function of seed, purpose and numbers, and of nothing else."""

import torch

from dino_adapters.runtime.chance import derive, generator, numpy_generator


def test_equal_words_equal_draws():
    first = torch.rand(4, generator=generator(1, "views", 7))
    torch.rand(9)
    assert torch.equal(first, torch.rand(4, generator=generator(1, "views", 7)))
    assert numpy_generator(1, "order", 2).random() == numpy_generator(1, "order", 2).random()


def test_other_words_other_draws():
    seeds = {derive(s, p, n) for s in range(5) for p in ("a", "b", "a/1") for n in range(20)}
    assert len(seeds) == 5 * 3 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_never_change_between_releases():
    assert derive(0, "views", 1) == 5970175614753261993
