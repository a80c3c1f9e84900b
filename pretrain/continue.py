"""A trained network continued on your unlabelled images, with a gate: better than before, or the old one.

Command:  dino-adapters pretrain pretrain/continue.py data.source=FOLDER model.source=WEIGHTS \
              monitor.labels=FEW.csv --out runs/continued
Hardware: 2 CPU cores, or a GPU.
Reached:  see pretrain/README.md.

WEIGHTS is anything that load_backbone opens; without it, a small public CNN (extra `demo`), which trains
without iBOT. New heads learn first, on a backbone that stands still; then its rate rises from 0.
The last line says "better", "no difference" or "worse", with an interval, as far as a few labelled
images can tell, and export/ holds the better of the two.
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
# The rule makes that 7e-4 for 32 images and 1e-3 for 64.
optim = dict(
    batch_size="auto", lr=1e-3, lr_rule="sqrt_1024", weight_decay=(0.04, 0.04), layer_decay=0.9
)
# With 1.0 and 4e-4 a CNN hardly moved in 100 steps on UC Merced, with 0.3 and 8e-4 a ViT on blood cells.
anchor = dict(cls_weight=0.1)
schedule = dict(
    warmup=0.1,
    freeze_backbone=0.1,
    backbone_ramp=0.1,
    # A tenth of the run: a teacher of the usual 0.996 would hardly move in some hundred steps.
    momentum_span=0.1,
)
gate = dict()
monitor = dict(every=0.2, on_collapse="rollback")
checkpoint = dict(every_steps=50)
steps = 250
