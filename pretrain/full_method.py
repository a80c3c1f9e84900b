"""DINOv3's whole method in minutes on a CPU: pretrain, Gram anchoring, high resolution, distillation.

Command:  dino-adapters pretrain pretrain/full_method.py data.source=FOLDER --out runs/full
Hardware: 2 CPU cores.
Memory:   0.03 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     9 min 38 s beside other work on the cores, 6 min 11 s of processor time, on the 308 training
          photographs of a flower set, data.image_size=128.
          (split=PHOTOS/splits.csv, and dino-adapters evaluate tasks/web/photos/recipe.py
          data.source=PHOTOS split=PHOTOS/splits.csv backbone=EXPORT size=96 --out FOLDER)
Reached:  nearest class mean on 5 flower classes, 5 labels each, read at 96 px, balanced accuracy in
          % (half the 95 % interval over 10 draws): untrained 28.1 (2.8), pretrain 32.6 (3.0), gram
          34.6 (2.5), highres 35.1 (2.5), student 30.2 (1.4); image statistics 35.5 (4.5).
          The class-token term ended its first phase at 5.21 of log K = 5.55.

For images of about 96 to 128 px. Sizes keep DINOv3's relations: Gram teacher at twice the crops,
then a mixture of larger crops with the Gram teacher at 1.5 times those. A micro network is
far too small for dense features to decay; this shows the stages at work, not what they are for.
The export is the student, half as wide; the network before it is in phases/3_highres/export.
Steps of one phase: phases.pretrain.steps=1200. Then phases.gram.gram.teacher has to name one of the
new snapshots, at 1/5, 2/5, ... of the phase: phases.gram.gram.teacher=pretrain@240.
"""

model = dict(source="vitmicro8")
data = dict(source="give data.source=FOLDER")
crops = dict(
    global_size=48,
    local_size=24,
    local_count=4,
    # Blur and solarise were made for crops of 224 px; small crops consist of the texture they remove.
    blur=(0.0, 0.2, 0.1),
    blur_sigma=(0.1, 1.0),
    solarize=0.1,
)
# Few prototypes for few images. With 1,024, a rate of 3e-3 and a temperature that rises to 0.07, the
# class-token term of one run went back to log K.
objective = dict(
    prototypes=256,
    hidden_dim=256,
    bottleneck_dim=64,
    prototype_norm=1.0,
    teacher_temperature=(0.04, 0.04),
)
optim = dict(batch_size=32, lr=1e-3, layer_decay=1.0, weight_decay=(0.04, 0.1))
checkpoint = dict(every_steps=100)
phases = [
    # Snapshots after 120, 240, 360 and 480 steps; the first is the Gram teacher.
    dict(name="pretrain", steps=600, optim=dict(lr_end=1e-4), checkpoint=dict(snapshots=4)),
    dict(
        name="gram",
        start="state",
        steps=150,
        gram=dict(
            teacher="pretrain@120",
            weight=2.0,
            ramp=0.1,
            size=96,
            refresh_every=30,
            first_refresh=30,
            max_refreshes=3,
        ),
        objective=dict(local_weight=(1.0, 0.5)),
        optim=dict(lr=1e-4, lr_end=1e-4, weight_decay=(0.1, 0.1)),
        schedule=dict(
            warmup=0.0,
            freeze_last_layer=0.0,
            temperature_warmup=0.0,
            momentum=(0.99, 0.999),
            local_ramp=0.1,
        ),
    ),
    dict(
        name="highres",
        start="teacher",
        steps=80,
        gram=dict(teacher="gram", weight=1.5),
        crops=dict(
            mixture=[
                dict(global_size=64, local_size=24, gram_size=96, probability=0.30),
                dict(global_size=80, local_size=24, gram_size=120, probability=0.30),
                dict(global_size=80, local_size=32, gram_size=120, probability=0.30),
                dict(global_size=80, local_size=40, gram_size=120, probability=0.10),
            ]
        ),
        objective=dict(local_weight=(0.5, 0.5)),
        optim=dict(batch_size=16, lr=1e-4, lr_end=1e-4, weight_decay=(0.1, 0.1)),
        schedule=dict(
            warmup=0.33,
            freeze_last_layer=0.0,
            temperature_warmup=0.0,
            momentum=(0.99, 0.999),
        ),
    ),
    dict(
        name="distill",
        steps=300,
        distill=dict(
            students=dict(
                small=dict(source="vitmicro8", architecture=dict(embed_dim=48, num_heads=3)),
            )
        ),
    ),
]
