"""Kind `vit_train_draws`: train mode with every random draw replayed in order."""

from ..case import Case
from ..networks import check_gradients, official_network, vit_config
from ..replay import ReplayedDraws
from .vit import PROBE_BOUND, check_features


def read(case: Case) -> None:
    constants = case.settings["constants"]
    constants.skip("activation", "attention_scale", because="sentences; the results prove them")
    official = case.settings["config"]
    config = vit_config(official, constants["norm_eps"])
    rate = official["drop_path_rate"]
    network = official_network(case.tensors("w/"), config, case.dtype, drop_path=rate).train()
    crops = [case.tensor("in/global"), case.tensor("in/local")]
    masks = [case.tensor("in/mask"), None]

    replayed = ReplayedDraws(case, case.settings["draws"])
    network.set_draws(replayed)
    tokens = network.encode(crops, masks)
    replayed.finish()
    replayed = ReplayedDraws(case, case.settings["draws"])
    network.set_draws(replayed)
    found = network.forward_crops(crops, masks)
    replayed.finish()
    for group, features, before_norm in zip(("global", "local"), found, tokens, strict=True):
        check_features(case, f"out/{group}", features, before_norm)

    loss = (tokens[0] * case.tensor("in/probe_global")).sum()
    # The two terms come from two passes with the same draws: gradients add up all the same.
    loss = loss + (found[1].cls * case.tensor("in/probe_local_cls")).sum()
    case.check("out/probe_loss", loss, bound=PROBE_BOUND)
    check_gradients(case, network, loss)
