"""A ViT-S/16 from nothing on overhead images, which have no up: a starting point.

Command:  dino-adapters pretrain pretrain/satellite.py data.source=FOLDER --out runs/satellite
Hardware: one GPU.
Memory:   0.74 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

For other bands than RGB name them with data.bands, and for 16-bit files give data.value_range.
Not sayable in a recipe: turns by 90 degrees, hue off by itself (it belongs to the jitter), and a
mean and standard deviation of your own for RGB (other bands have theirs from the images).
"""

# DINOv3's LayerScale of 1e-5 is for very long runs and stalls short ones; this gain is a guess.
model = dict(source="vits16", architecture=dict(layerscale=0.1), drop_path=0.1)
data = dict(source="give data.source=FOLDER", workers=8, memory_gb=16.0)
crops = dict(
    global_size=224,
    local_size=96,
    local_count=6,
    vertical_flip=True,
    # Colour tells crops, soils and roofs apart; strong jitter unlearns it.
    jitter=0.4,
    grayscale=0.0,
    solarize=0.0,
)
objective = dict(
    # Tiles of one scene are near-duplicates, which KoLeo would push apart without end.
    regularizer="kde",
    regularizer_weight=0.05,
    prototypes=8192,
    hidden_dim=2048,
    bottleneck_dim=256,
    prototype_norm=1.0,
)
optim = dict(batch_size=256, lr=5e-4, lr_rule="sqrt_1024")
schedule = dict(momentum=(0.996, 1.0))
checkpoint = dict(every_steps=1000, snapshots=4)
steps = 50_000
