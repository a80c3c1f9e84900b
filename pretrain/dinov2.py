"""DINOv2 (arXiv 2304.07193) with a ViT-S/14 from nothing.

Command:  dino-adapters pretrain pretrain/dinov2.py data.source=FOLDER --out runs/dinov2
Hardware: large GPUs.
Memory:   2.35 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

Settings of the original's ImageNet-22k files, with a smaller network (the released ViT-S/14 is
distilled) and with its feed-forward; drop path 0.1 is our choice (0.4 there). The original's short
recipe of 125,000 steps differs in these:
    objective.centering=softmax objective.shared_head=true objective.prototypes=65536
    objective.bottleneck_dim=256 objective.ibot_bottleneck_dim=null
    optim.lr=1e-3 optim.layer_decay=0.9 optim.weight_decay=[0.04,0.4]
    schedule.warmup=0.1 schedule.temperature_warmup=0.3 schedule.freeze_last_layer=0.01
    schedule.momentum=[0.992,1] steps=125000, and patches of 16 px.
The whole batch is on one device: lower optim.batch_size, the learning rate follows by its rule.
Not sayable in a recipe: KoLeo and masks per device, a class token that starts at 1e-6 (here 0.02,
as all tokens), fp16.
"""

model = dict(source="vits14_dinov2", drop_path=0.1)
data = dict(source="give data.source=FOLDER", workers=16, memory_gb=64.0)
crops = dict(global_size=224, local_size=98, local_count=8)
masks = dict(bins="uniform", block_limit="reference")
objective = dict(
    prototypes=131072,
    hidden_dim=2048,
    bottleneck_dim=384,
    ibot_bottleneck_dim=256,
    weight_norm="free",
)
optim = dict(
    batch_size=2048,
    # DINOv2's 2e-4: its rule has no factor of 4.
    lr=5e-5,
    lr_rule="sqrt_1024",
    weight_decay=(0.04, 0.2),
    layer_decay=1.0,
    decay_rule="name",
)
schedule = dict(
    family="v2",
    warmup=0.16,
    freeze_last_layer=0.002,
    temperature_warmup=0.06,
    momentum=(0.994, 1.0),
)
checkpoint = dict(every_steps=1250, snapshots=4)
steps = 625_000
