"""A micro ViT from nothing on a folder of small photographs: does everything work here?

Command:  dino-adapters pretrain pretrain/smoke.py data.source=FOLDER --out runs/smoke
Hardware: 2 CPU cores.
Time:     a minute or two (400 steps of these settings took 1 min 57 s in the demo).
Reached:  see pretrain/README.md; a smoke test, not a network to use.
"""

model = dict(source="vitmicro8")
data = dict(source="give data.source=FOLDER")
crops = dict(
    global_size=48,
    local_size=24,
    # Blur and solarise were made for crops of 224 px; small crops consist of the texture they remove.
    blur=(0.0, 0.2, 0.1),
    blur_sigma=(0.1, 1.0),
    solarize=0.1,
)
objective = dict(prototype_norm=1.0)
optim = dict(batch_size=32, lr=3e-3, layer_decay=1.0, weight_decay=(0.04, 0.1))
steps = 300
