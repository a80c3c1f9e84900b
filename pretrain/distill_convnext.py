"""A ConvNeXt-Tiny learns from a frozen ViT with its heads, on equal grids.

Command:  dino-adapters pretrain pretrain/distill_convnext.py data.source=FOLDER \\
              distill.teacher=runs/vit_large/export --out runs/distill_convnext
Hardware: large GPUs.
Memory:   1.48 GB of the student's weights, gradients, AdamW's moments and moving average, heads
          included, and 1.40 GB of a teacher from vit_large.py; computed. Activations come on top:
          not measured.
Time:     not measured.
Reached:  not measured.

Crop sizes are those of the student, whose stride is 32: 512 and 224 px. A teacher with patches of
16 px gets the same views at half the size, 256 and 112 px, and so both have 16 x 16 and 7 x 7
patches. Settings are those of the released file, batch 4,096 that of a remark in it.
objective.prototypes must be the teacher's: 65,536 are those of vit_large.py.
cnx_small takes the same settings; cnx_base and cnx_large half the rate, and cnx_base starts with a
weight decay of 0.02.
Not sayable in a recipe: momentum and weight decay along a straight line; here half a cosine.
"""

data = dict(source="give data.source=FOLDER", workers=16, memory_gb=64.0)
distill = dict(
    teacher="give distill.teacher=EXPORT",
    students=dict(tiny=dict(source="cnx_tiny")),
)
crops = dict(global_size=512, local_size=224, local_count=8)
masks = dict(block_limit="reference")
objective = dict(prototypes=65536, hidden_dim=2048, bottleneck_dim=256)
optim = dict(
    batch_size=4096,
    lr=2e-4,
    lr_end=1e-6,
    # Whether the file's rate is meant before or after this rule is not known.
    lr_rule="sqrt_1024",
    weight_decay=(0.04, 0.2),
    layer_decay=1.0,
    decay_rule="name",
)
schedule = dict(
    warmup=0.16,
    freeze_last_layer=0.002,
    temperature_warmup=0.24,
    momentum=(0.994, 1.0),
)
checkpoint = dict(every_steps=1250)
steps = 625_000
