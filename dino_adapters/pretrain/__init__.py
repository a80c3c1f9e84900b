"""Learning without labels: the terms of DINOv3 as pure functions, and runs made of them."""

from dino_adapters.pretrain.gram import gram_loss, resize_tokens
from dino_adapters.pretrain.losses import dino_loss, ibot_dense_loss, ibot_loss, koleo_loss
from dino_adapters.pretrain.phases import pretrain
from dino_adapters.pretrain.regularizers import kde_loss, sigreg_loss
from dino_adapters.pretrain.targets import sinkhorn_knopp, softmax_centering, update_center

__all__ = [
    "dino_loss",
    "gram_loss",
    "ibot_dense_loss",
    "ibot_loss",
    "kde_loss",
    "koleo_loss",
    "pretrain",
    "resize_tokens",
    "sigreg_loss",
    "sinkhorn_knopp",
    "softmax_centering",
    "update_center",
]
