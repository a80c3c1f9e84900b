"""Two phases, a ViT-B/16 from nothing and then Gram anchoring: the 7B run at a tenth of its steps.

Command:  dino-adapters pretrain pretrain/gram.py data.source=FOLDER --out runs/gram
Hardware: one large GPU.
Memory:   2.13 GB of weights, gradients, AdamW's moments and moving average, heads included, and
          0.34 GB of the Gram teacher; computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

The constant schedule, views, local weight and Gram settings are those of the 7B run; its 1M steps
are 100,000 here, and other counts shrink alike (refresh after 1,000 steps for 10,000, at most 3 times).
Network, heads, batch, learning rate and drop path are our choice. Dense features were seen to decay
in networks above ViT-L; below, this phase may have nothing to repair.
Images should have 900 px and more (512 / sqrt(0.32)), or small views of the Gram teacher are only
blown up.
"""

model = dict(source="vitb16", drop_path=0.2)
data = dict(source="give data.source=FOLDER", workers=16, memory_gb=64.0)
crops = dict(global_size=256, local_size=112, local_count=8, horizontal_flip=False)
objective = dict(
    prototypes=16384,
    hidden_dim=2048,
    bottleneck_dim=256,
    koleo_group=16,
)
optim = dict(
    batch_size=512,
    lr=1e-4,
    lr_end=1e-4,
    lr_rule="sqrt_1024",
    weight_decay=(0.04, 0.04),
    betas=(0.9, 0.99),
    clip=30.0,
    layer_decay=0.98,
    decay_rule="name",
)
schedule = dict(
    warmup=0.1,
    freeze_last_layer=0.005,
    temperature_warmup=0.1,
    momentum=(0.994, 0.994),
)
checkpoint = dict(every_steps=1000)
phases = [
    # Snapshots after 20,000, 40,000, 60,000 and 80,000 steps; the first is the Gram teacher.
    dict(name="pretrain", steps=100_000, checkpoint=dict(snapshots=4)),
    dict(
        name="gram",
        start="state",
        steps=20_000,
        gram=dict(
            teacher="pretrain@20000",
            weight=2.0,
            ramp=0.005,
            size=512,
            refresh_every=1000,
            first_refresh=1000,
            max_refreshes=3,
        ),
        objective=dict(teacher_temperature=(0.07, 0.07), local_weight=(1.0, 0.5)),
        optim=dict(lr=6e-5, lr_end=6e-5),
        schedule=dict(
            warmup=0.0,
            freeze_last_layer=0.0,
            temperature_warmup=0.0,
            momentum=(0.999, 0.999),
            local_ramp=0.005,
        ),
    ),
]
