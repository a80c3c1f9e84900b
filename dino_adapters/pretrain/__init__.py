"""Learning without labels."""

from dino_adapters.pretrain.losses import dino_loss, ibot_loss, koleo_loss
from dino_adapters.pretrain.phases import pretrain
from dino_adapters.pretrain.targets import sinkhorn_knopp

__all__ = ["dino_loss", "ibot_loss", "koleo_loss", "pretrain", "sinkhorn_knopp"]
