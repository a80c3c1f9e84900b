"""A ViT-S/16 from nothing on X-ray, CT or MR images: a starting point.

Command:  dino-adapters pretrain pretrain/medical.py data.source=FOLDER --out runs/medical
Hardware: one GPU.
Memory:   0.74 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

Grey images have no hue: the jitter is one of brightness and contrast for them, and files with three
equal channels stay grey. For 16-bit files give data.value_range, the window that is worth seeing. DICOM
and NIfTI are not read yet: convert to 16-bit PNG or TIFF first.
Stained slides have colour that means something and no up:
    crops.jitter=0 crops.horizontal_flip=true crops.vertical_flip=true
Not sayable in a recipe: jitter of brightness and contrast without hue for colour images, jitter of
stains.
"""

# DINOv3's LayerScale of 1e-5 is for very long runs and stalls short ones; this gain is a guess.
model = dict(source="vits16", architecture=dict(layerscale=0.1), drop_path=0.1)
data = dict(source="give data.source=FOLDER", workers=8, memory_gb=16.0)
crops = dict(
    global_size=224,
    local_size=96,
    local_count=6,
    # Small findings vanish from crops of a twentieth of the image.
    local_scale=(0.1, 0.4),
    # Bodies have sides.
    horizontal_flip=False,
    jitter=0.8,
    grayscale=0.0,
    # Blur and solarise take away what texture and density tell.
    blur=(0.0, 0.2, 0.1),
    blur_sigma=(0.1, 1.0),
    solarize=0.0,
)
objective = dict(
    # Neighbouring slices are near-duplicates, which KoLeo would push apart without end.
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
