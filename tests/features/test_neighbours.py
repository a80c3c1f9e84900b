import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_adapters.contracts import DataError, ShapeError
from dino_adapters.features import neighbours
from dino_adapters.features.neighbours import nearest


def slow(queries: np.ndarray, bank: np.ndarray, k: int, metric: str):
    """One query and one bank row at a time; sorted() keeps the lower index of equals first."""
    found = []
    for query in queries.astype(np.float64):
        scores = []
        for row in bank.astype(np.float64):
            if metric == "l2":
                scores.append(-round(np.sqrt(((query - row) ** 2).sum()), 10))
            else:
                length = np.linalg.norm(query) * np.linalg.norm(row)
                cosine = query @ row / length if length else 0.0
                scores.append(round(cosine, 10))
        order = sorted(range(len(bank)), key=lambda i: -scores[i])[:k]
        found.append([(i, scores[i]) for i in order])
    return found


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from(["cosine", "l2"]),
    st.data(),
)
def test_equals_the_slow_loop_with_many_ties(seed, count, size, width, metric, data):
    rng = np.random.default_rng(seed)
    # Few distinct values: ties are the rule, and zero vectors occur.
    queries = rng.integers(-1, 2, (count, width)).astype(np.float32)
    bank = rng.integers(-1, 2, (size, width)).astype(np.float32)
    k = data.draw(st.integers(1, size))
    indices, values = nearest(torch.from_numpy(queries), torch.from_numpy(bank), k, metric=metric)
    expected = slow(queries, bank, k, metric)
    assert indices.tolist() == [[i for i, _ in row] for row in expected]
    np.testing.assert_allclose(values, [[v for _, v in row] for row in expected], atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_chunks_change_nothing(monkeypatch, metric):
    rng = torch.Generator().manual_seed(1)
    queries, bank = torch.randn(37, 16, generator=rng), torch.randn(50, 16, generator=rng)
    whole = nearest(queries, bank, 7, metric=metric)
    monkeypatch.setattr(neighbours, "CHUNK_CELLS", 120)
    parts = nearest(queries, bank, 7, metric=metric)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_copies_of_a_vector_tie_wherever_they_stand(metric):
    rng = torch.Generator().manual_seed(2)
    bank = torch.randn(101, 384, generator=rng)
    places = [3, 17, 50, 99, 100]
    bank[places] = bank[3].clone()
    indices, values = nearest(bank[3:4], bank, 5, metric=metric)
    assert indices[0].tolist() == places
    assert values[0].unique().numel() == 1


def test_almost_equal_vectors_are_told_apart():
    # CLS tokens of an untrained network differ by some 1e-5: their cosines are all 1 in float32.
    rng = torch.Generator().manual_seed(3)
    shifts = torch.randn(40, 96, generator=rng)
    bank = torch.randn(1, 96, generator=rng) + 1e-5 * shifts
    indices, _ = nearest(bank, bank, 1)
    assert indices[:, 0].tolist() == list(range(40))


def test_no_queries_give_empty_answers():
    indices, values = nearest(torch.zeros(0, 3), torch.ones(4, 3), 2)
    assert indices.shape == values.shape == (0, 2)


def test_bad_shapes_are_refused():
    with pytest.raises(ShapeError, match="same D"):
        nearest(torch.zeros(2, 3), torch.zeros(2, 4), 1)
    for k in (0, 3):
        with pytest.raises(ShapeError, match=f"k is {k}"):
            nearest(torch.zeros(2, 3), torch.zeros(2, 3), k)


def test_nan_is_refused():
    with pytest.raises(DataError, match="not finite"):
        nearest(torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]]), 1)
