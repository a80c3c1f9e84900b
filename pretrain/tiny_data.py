"""A micro ViT from nothing on 500 to 5,000 images: everything that depends on their number is derived.

Command:  dino-adapters pretrain pretrain/tiny_data.py data.source=FOLDER --out runs/tiny
Hardware: 2 CPU cores.
Reached:  see pretrain/README.md: far below a trained network, so try continue.py first.

Batch, prototypes and steps follow the number of images, each with its reason in the log; `--plan` says
them before anything runs.
"""

model = dict(source="vitmicro8")
data = dict(source="give data.source=FOLDER")
crops = dict(
    global_size=48,
    local_size=24,
    blur=(0.0, 0.2, 0.1),
    blur_sigma=(0.1, 1.0),
    solarize=0.1,
)
objective = dict(
    prototypes="auto",
    hidden_dim=256,
    bottleneck_dim=64,
    prototype_norm=1.0,
    teacher_temperature=(0.04, 0.04),
)
optim = dict(
    batch_size="auto", lr=1e-3, lr_rule="sqrt_1024", layer_decay=1.0, weight_decay=(0.04, 0.1)
)
schedule = dict(momentum_span=0.1)
monitor = dict(on_collapse="stop")
steps = "auto"
