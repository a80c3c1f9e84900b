"""DINOv3's ImageNet-1k recipe with a ViT-B/16 in place of the ViT-L.

Command:  dino-adapters pretrain pretrain/vit_base.py data.source=FOLDER --out runs/vit_base
Hardware: large GPUs.
Memory:   2.64 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

The released ViT-B is distilled (distill_vit.py); drop path 0.2 is our choice.

The whole batch is on one device, and steps are not accumulated. Lower optim.batch_size to what fits;
the learning rate follows by its rule. objective.koleo_group must divide it, and log(K / (2 * batch))
should stay below 3: lower objective.prototypes too.
Not sayable in a recipe: masks made for each of 32 devices by itself; koleo_group stands for theirs.
"""

model = dict(
    source="vitb16",
    architecture=dict(
        registers=0, norm_eps=1e-6, mask_k_bias=False, rope_rescale=None, rope_dtype="bf16"
    ),
    drop_path=0.2,
)
data = dict(source="give data.source=FOLDER", workers=16, memory_gb=64.0)
crops = dict(global_size=224, local_size=96, local_count=8)
masks = dict(block_limit="reference")
objective = dict(prototypes=65536, hidden_dim=2048, bottleneck_dim=256, koleo_group=64)
optim = dict(batch_size=2048, lr=1e-3, lr_rule="sqrt_1024", decay_rule="name")
checkpoint = dict(every_steps=1250, snapshots=4)
steps = 125_000
"""256 million images, 100 "epochs" of 1,250 steps: lr rises over 10, temperature over 30 of them."""
