"""Two phases, a ViT-S/16 from nothing and then DINOv3's mixture of high resolutions.

Command:  dino-adapters pretrain pretrain/highres.py data.source=FOLDER --out runs/highres
Hardware: one large GPU.
Memory:   0.82 GB of weights, gradients, AdamW's moments and moving average, heads included, and
          0.09 GB of the Gram teacher; computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

The mixture is DINOv3's own: 512 and 768 px, Gram teacher at 1.5 times that, weight 1.5, which never
changes. Lengths, network, heads, batch and learning rate are our choice. For images of some 500 px
halve all sizes of the mixture, or the views are only blown up. full_method.py has the Gram phase
between the two.
The settings around the phases are those of gram.py.
Not sayable in a recipe: a rate that rises as a cosine and then stays; here the rise is linear.
"""

_base_ = ["gram.py"]

model = dict(source="vits16", drop_path=0.1)
optim = dict(lr=2e-4, lr_end=2e-4)
phases = [
    dict(name="pretrain", steps=100_000),
    dict(
        name="highres",
        start="teacher",
        steps=3000,
        gram=dict(teacher="pretrain", weight=1.5),
        crops=dict(
            mixture=[
                dict(global_size=512, local_size=112, gram_size=768, probability=0.30),
                dict(global_size=768, local_size=112, gram_size=1152, probability=0.30),
                dict(global_size=768, local_size=168, gram_size=1152, probability=0.30),
                dict(global_size=768, local_size=224, gram_size=1152, probability=0.05),
                dict(global_size=768, local_size=336, gram_size=1152, probability=0.05),
            ]
        ),
        objective=dict(teacher_temperature=(0.07, 0.07), local_weight=(0.5, 0.5)),
        optim=dict(batch_size=64, lr=5e-5, lr_end=5e-5),
        schedule=dict(
            warmup=0.33,
            freeze_last_layer=0.0,
            temperature_warmup=0.0,
            momentum=(0.999, 0.999),
        ),
    ),
]
