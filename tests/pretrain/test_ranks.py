"""Terms over several ranks equal one process: simulated in threads, and in real processes."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from dino_adapters.contracts import ShapeError
from dino_adapters.pretrain.losses import koleo_loss
from dino_adapters.pretrain.ranks import ALONE, ProcessGroup
from dino_adapters.pretrain.regularizers import kde_loss, sigreg_loss
from dino_adapters.pretrain.targets import sinkhorn_knopp, update_center


class Pretended:
    """One of several ranks that are threads of this process and share one autograd graph."""

    def __init__(self, rank, size, table, barrier):
        self.rank, self.size, self.table, self.barrier = rank, size, table, barrier

    def _all(self, x):
        self.table[self.rank] = x
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found

    def sum(self, x):
        return torch.stack(self._all(x.detach())).sum(0)

    def largest(self, x):
        return torch.stack(self._all(x.detach())).amax(0)

    def rows(self, x):
        parts = self._all(x)
        assert len({part.shape for part in parts}) == 1
        return torch.cat(parts)


def over(size, work):
    """Results of `work(ranks)` for each of `size` ranks."""
    barrier, table = threading.Barrier(size, timeout=20), [None] * size

    def run(rank):
        try:
            return work(Pretended(rank, size, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [job.result() for job in [pool.submit(run, rank) for rank in range(size)]]


def normal(*shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def slow_koleo(tokens, group, most):
    """The loss of every row, by loops; neighbours by sorting cosines."""
    x = [t / max(float(t.norm()), 1e-8) for t in tokens]
    rows = []
    for i, a in enumerate(x):
        first = i // group * group
        others = [j for j in range(first, first + group) if j != i]
        near = sorted(others, key=lambda j: -float(a @ x[j]))[:most]
        rows.append(sum(-math.log(float((a - x[j] + 1e-8).norm()) + 1e-8) for j in near) / most)
    return rows


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("group", [None, 4, 8, 16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_koleo_over_ranks_is_the_loops_of_one_process(size, group, most):
    tokens = normal(16, 5).requires_grad_()
    parts = tokens.chunk(size)
    losses = over(size, lambda r: koleo_loss(parts[r.rank], neighbours=most, group=group, ranks=r))
    rows = slow_koleo(tokens.detach(), group or 16, most)
    share = 16 // size
    for rank, loss in enumerate(losses):
        expected = sum(rows[rank * share : (rank + 1) * share]) / share
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    (ours,) = torch.autograd.grad(torch.stack(losses).mean(), tokens)
    alone = koleo_loss(tokens, neighbours=most, group=group)
    (expected,) = torch.autograd.grad(alone, tokens)
    torch.testing.assert_close(ours, expected)


def test_koleo_group_of_the_rank_is_the_loss_of_each_device():
    tokens = normal(12, 6)
    found = over(3, lambda r: koleo_loss(tokens.chunk(3)[r.rank], group=4, ranks=r))
    for part, loss in zip(tokens.chunk(3), found, strict=True):
        torch.testing.assert_close(loss, koleo_loss(part))


def test_koleo_of_one_image_a_rank_still_has_neighbours():
    tokens = normal(3, 6)
    found = over(3, lambda r: koleo_loss(tokens[r.rank : r.rank + 1], ranks=r))
    assert [float(loss) for loss in found] == pytest.approx(slow_koleo(tokens, 3, 1))


def test_koleo_refuses_groups_that_do_not_divide_the_global_batch():
    with pytest.raises(ShapeError, match=r"groups of 5 .* batch of 16"):
        over(2, lambda r: koleo_loss(normal(8, 3), group=5, ranks=r))


COUNTS = [(3, 4), (5, 0, 2), (0, 0, 4, 1), (0, 0)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_sinkhorn_over_uneven_ranks_is_one_process(counts):
    logits = normal(sum(counts), 9) * 2
    parts = logits.split(counts)
    found = over(len(counts), lambda r: sinkhorn_knopp(parts[r.rank], temperature=0.1, ranks=r))
    assert [len(part) for part in found] == list(counts)
    torch.testing.assert_close(torch.cat(found), sinkhorn_knopp(logits, temperature=0.1))


def test_sinkhorn_over_ranks_survives_large_logits():
    logits = (normal(8, 6) * 1e4).float()
    found = over(2, lambda r: sinkhorn_knopp(logits.chunk(2)[r.rank], temperature=0.04, ranks=r))
    torch.testing.assert_close(torch.cat(found).sum(1), torch.ones(8))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_center_weighs_rows_not_ranks(counts):
    logits, center = normal(sum(counts), 9), normal(1, 9, seed=1)
    parts = logits.split(counts)
    expected = 0.9 * center + 0.1 * logits.mean(0) if len(logits) else center
    for found in over(len(counts), lambda r: update_center(center, parts[r.rank], ranks=r)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "loss", [kde_loss, lambda x, ranks=ALONE: sigreg_loss(x, step=3, ranks=ranks)]
)
@pytest.mark.parametrize("size", [2, 3])
def test_regularizers_over_ranks_are_one_process(size, loss):
    tokens = normal(12, 5).requires_grad_()
    found = torch.stack(over(size, lambda r: loss(tokens.chunk(size)[r.rank], ranks=r)))
    alone = loss(tokens)
    torch.testing.assert_close(found.mean(), alone)
    (ours,) = torch.autograd.grad(found.mean(), tokens)
    (expected,) = torch.autograd.grad(alone, tokens)
    torch.testing.assert_close(ours, expected)


def test_alone_gives_back_what_it_got():
    x = torch.ones(3, requires_grad=True)
    assert ALONE.rows(x) is x
    assert not ALONE.sum(x).requires_grad
    assert torch.equal(ALONE.largest(x), x)


def test_a_process_group_must_run():
    with pytest.raises(ValueError, match="process group"):
        ProcessGroup()


def test_real_processes(tmp_path):
    """Everything of `ProcessGroup` in one start of three processes."""
    path = Path(__file__).parents[1] / "golden" / "gloo_ranks.py"
    spec = spec_from_file_location("gloo_ranks", path)
    assert spec is not None
    assert spec.loader is not None
    gloo = module_from_spec(spec)
    spec.loader.exec_module(gloo)

    tokens = normal(6, 5)
    uneven = normal(7, 5, seed=2).split([4, 0, 3])
    center = normal(1, 5, seed=3)
    here = "dino_adapters.pretrain"
    even = [part.clone().requires_grad_() for part in tokens.chunk(3)]
    numbers = [torch.tensor([float(r), -torch.inf]) for r in range(3)]
    terms = {
        f"{here}.losses:koleo_loss": (koleo_loss, {"neighbours": 2}),
        f"{here}.regularizers:kde_loss": (kde_loss, {}),
        f"{here}.regularizers:sigreg_loss": (sigreg_loss, {"step": 1, "directions": 8}),
    }
    jobs = [{"call": "ranks:rows", "inputs": even}]
    jobs += [{"call": f"ranks:{name}", "inputs": numbers} for name in ("sum", "largest")]
    jobs += [
        {
            "call": f"{here}.targets:sinkhorn_knopp",
            "inputs": list(uneven),
            "settings": {"temperature": 0.1},
        },
        {"call": f"{here}.targets:update_center", "inputs": list(uneven), "first": [center]},
    ]
    jobs += [{"call": call, "inputs": even, "settings": s} for call, (_, s) in terms.items()]
    rows, total, largest, balanced, centers, *found = gloo.over_gloo(jobs, 3, tmp_path)

    for rank, (gathered, gradient) in enumerate(rows):
        assert torch.equal(gathered, tokens)
        # Rank r weighs the squares of all rows by r + 1.
        torch.testing.assert_close(gradient, 2 * 6 * tokens[2 * rank : 2 * rank + 2])
        assert total[rank][0].tolist() == [3.0, -math.inf]
        assert largest[rank][0].tolist() == [2.0, -math.inf]
        expected = update_center(center, torch.cat(uneven))
        torch.testing.assert_close(centers[rank][0], expected)
    targets = torch.cat([result for result, _ in balanced])
    torch.testing.assert_close(targets, sinkhorn_knopp(torch.cat(uneven), temperature=0.1))
    for (term, settings), by_rank in zip(terms.values(), found, strict=True):
        leaf = tokens.clone().requires_grad_()
        alone = term(leaf, **settings)
        alone.backward()
        torch.testing.assert_close(torch.stack([value for value, _ in by_rank]).mean(), alone)
        # What averaging over ranks makes of the gradients is the gradient of one process.
        ours = torch.cat([gradient for _, gradient in by_rank]) / 3
        torch.testing.assert_close(ours, leaf.grad)
