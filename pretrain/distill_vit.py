"""A ViT-S/16 and a ViT-B/16 learn together from one frozen teacher with its heads.

Command:  dino-adapters pretrain pretrain/distill_vit.py data.source=FOLDER \\
              distill.teacher=runs/vit_large/export --out runs/distill_vit
Hardware: large GPUs; the released file spreads a batch over 296 of them.
Memory:   3.96 GB of both students' weights, gradients, AdamW's moments and moving averages, heads
          included, and 1.40 GB of a teacher from vit_large.py; computed. Activations come on top:
          not measured.
Time:     not measured.
Reached:  not measured.

Settings are those of the released file for a distilled ViT-L: a phase of 25,000 steps that went on
from an earlier student; from nothing give more (the paper: 1M and a cool-down of 250,000).
objective.prototypes must be the teacher's: 65,536 are those of vit_large.py.
Not sayable in a recipe: a rate that rises as a cosine and then stays; here the rise is linear.
"""

data = dict(source="give data.source=FOLDER", workers=16, memory_gb=64.0)
distill = dict(
    teacher="give distill.teacher=EXPORT",
    students=dict(
        small=dict(source="vits16"),
        base=dict(source="vitb16"),
    ),
)
crops = dict(global_size=256, local_size=112, local_count=8, horizontal_flip=False)
masks = dict(block_limit="reference")
objective = dict(
    prototypes=65536,
    hidden_dim=2048,
    bottleneck_dim=256,
    teacher_temperature=(0.07, 0.07),
)
optim = dict(
    batch_size=1920,
    lr=5e-5,
    lr_end=5e-5,
    lr_rule="sqrt_1024",
    weight_decay=(0.04, 0.04),
    layer_decay=0.99,
    decay_rule="name",
)
schedule = dict(
    warmup=0.5,
    freeze_last_layer=0.0,
    temperature_warmup=0.0,
    momentum=(0.994, 1.0),
)
checkpoint = dict(every_steps=1250)
steps = 25_000
