"""A trained network continued on your unlabelled images, with a gate: better than before, or the old one.

Command:  dino-adapters pretrain pretrain/continue.py data.source=FOLDER model.source=WEIGHTS \
              monitor.labels=FEW.csv --out runs/continued
Hardware: 2 CPU cores, or a GPU.
Reached:  see pretrain/README.md.

WEIGHTS is anything that load_backbone opens (the README has a table); without it, a small public CNN
(extra `demo`), which trains without iBOT. New heads learn first, on a backbone that stands still; then
its rate rises from 0. At the end stands "better", "no difference", "worse" or, with too few labels,
"open", with an interval; export/ holds the start, unless the continued one was shown to be better.

Overhead images want crops.vertical_flip=true; networks with patches of 14 px want
crops.global_size=126 crops.local_size=70.
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
objective = dict(prototypes="auto", prototype_norm=1.0, teacher_temperature=(0.06, 0.06))
# The rule makes that 5.7e-4 for 32 images and 8e-4 for 64.
optim = dict(
    batch_size="auto", lr=8e-4, lr_rule="sqrt_1024", weight_decay=(0.04, 0.04), layer_decay=0.9
)
anchor = dict(cls_weight=0.3)
schedule = dict(
    warmup=0.1,
    freeze_backbone=0.1,
    backbone_ramp=0.1,
    # Half of the run: a teacher of the usual 0.996 would hardly move in some hundred steps.
    momentum_span=0.5,
)
gate = dict()
monitor = dict(every=0.2, on_collapse="rollback")
checkpoint = dict(every_steps=50)
steps = 250
