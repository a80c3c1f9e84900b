"""DINO (arXiv 2104.14294) with a ViT-S/16 from nothing.

Command:  dino-adapters pretrain pretrain/dino_v1.py data.source=FOLDER --out runs/dino_v1
Hardware: large GPUs.
Memory:   0.88 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

The defaults of the original at a batch of 1,024 and 100 passes over ImageNet-1k. The whole batch is
on one device: lower optim.batch_size, the learning rate follows by its rule; for 256 images the
original advises schedule.momentum=[0.9995,1].
Not sayable in a recipe: drop path that grows with depth (here the same in all blocks), the blur of
another library, prototypes frozen without moments of the optimiser, weight decay of tokens and
positions (here they are spared, like all vectors), fp16.
"""

model = dict(source="vits16_dino", drop_path=0.1)
data = dict(source="give data.source=FOLDER", workers=16, memory_gb=64.0)
crops = dict(
    global_size=224,
    global_scale=(0.4, 1.0),
    local_size=96,
    local_scale=(0.05, 0.4),
    local_count=8,
    blur=(1.0, 0.1, 0.5),
)
objective = dict(
    ibot_weight=0.0,
    regularizer="none",
    prototypes=65536,
    hidden_dim=2048,
    bottleneck_dim=256,
    weight_norm="fixed",
    centering="softmax",
    center_momentum=0.9,
    teacher_temperature=(0.04, 0.04),
)
optim = dict(
    batch_size=1024,
    lr=5e-4,
    lr_rule="linear_256",
    weight_decay=(0.04, 0.4),
    clip=3.0,
    clip_each="tensor",
    layer_decay=1.0,
    patch_embed_multiplier=1.0,
)
schedule = dict(
    family="v2",
    warmup=0.1,
    freeze_last_layer=0.01,
    temperature_warmup=0.0,
    momentum=(0.996, 1.0),
)
checkpoint = dict(every_steps=1250, snapshots=4)
steps = 125_000
