"""Kind `head`: projection heads with 1 to 4 layers, whole and in two halves, and their start."""

import torch

from dino_adapters.pretrain.prototypes import ProjectionHead

from ..case import Case, Settings

DEVIATION = 0.02
"""Of all weights at the start, by the method; biases are 0."""


def read(case: Case) -> None:
    config = case.settings["config"]
    config.skip("init", because="a sentence, whose law the statistics below are held against")
    for settings in config["heads"]:
        _read_head(case, settings)


def _read_head(case: Case, settings: Settings) -> None:
    index = settings["index"]
    head = ProjectionHead(
        settings["in_dim"],
        settings["out_dim"],
        hidden_dim=settings["hidden_dim"],
        bottleneck_dim=settings["bottleneck_dim"],
        layers=settings["nlayers"],
    )
    weights = case.tensors(f"w/{index}/")
    assert set(weights) == set(settings["keys"]) == set(head.state_dict())
    _check_start(head, settings["init_stats_of_one_draw"])
    head.load_state_dict(weights)
    head.to(case.dtype)
    tokens = case.tensor(f"in/{index}/x").requires_grad_()
    scores = head(tokens)
    case.check(f"out/{index}/full", scores)
    bottleneck = head.project(tokens)
    case.check(f"out/{index}/no_last_layer", bottleneck)
    trunk = head.trunk(tokens)
    length = trunk.norm(dim=-1, keepdim=True)
    case.check(f"out/{index}/no_last_layer", trunk / length)
    stored = case.tensor(f"out/{index}/no_last_layer")
    case.check(f"out/{index}/only_last_of_no_last", head.scores(stored))
    (scores * case.tensor(f"in/{index}/probe")).sum().backward()
    assert tokens.grad is not None
    case.check(f"grad/{index}/x", tokens.grad)
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        case.check(f"grad/{index}/{name}", parameter.grad)


def _check_start(head: ProjectionHead, statistics: Settings) -> None:
    """Their draw and ours both follow the law; 6 standard errors are allowed."""
    head.reset_parameters(torch.Generator().manual_seed(0))
    for name, value in head.state_dict().items():
        found = {
            "mean": float(value.mean()),
            "std": float(value.std()),
            "absmax": float(value.abs().max()),
        }
        for numbers in (found, statistics[name]):
            wide = 0.0 if name.endswith("bias") else DEVIATION
            assert abs(numbers["mean"]) <= 6 * wide / value.numel() ** 0.5, name
            assert abs(numbers["std"] - wide) <= 6 * wide / (2 * value.numel()) ** 0.5, name
            assert numbers["absmax"] <= 6 * wide, name
