"""A ViT-S/16 from nothing on mixed photographs, DINOv3's views as they are: a starting point.

Command:  dino-adapters pretrain pretrain/web.py data.source=FOLDER --out runs/web
Hardware: one GPU.
Memory:   0.82 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

For 100,000 images and more. K follows the batch: log(K / (2 * batch_size)) stays below 3, so halve
objective.prototypes when you halve optim.batch_size; the learning rate follows by its rule.
"""

# DINOv3's LayerScale of 1e-5 is for very long runs and stalls short ones; this gain is a guess.
model = dict(source="vits16", architecture=dict(layerscale=0.1), drop_path=0.1)
data = dict(source="give data.source=FOLDER", workers=8, memory_gb=16.0)
crops = dict(global_size=224, local_size=96, local_count=6)
objective = dict(
    prototypes=16384,
    hidden_dim=2048,
    bottleneck_dim=256,
    # Unit length sharpens the targets from the first step; DINOv3's 0.32 takes long to get there.
    prototype_norm=1.0,
)
optim = dict(batch_size=512, lr=5e-4, lr_rule="sqrt_1024")
schedule = dict(momentum=(0.994, 1.0))
checkpoint = dict(every_steps=2000, snapshots=4)
steps = 100_000
"""Optimiser steps: 51 million images."""
