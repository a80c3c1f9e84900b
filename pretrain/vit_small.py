"""DINOv3's ImageNet-1k recipe with a ViT-S/16 in place of the ViT-L.

Command:  dino-adapters pretrain pretrain/vit_small.py data.source=FOLDER --out runs/vit_small
Hardware: large GPUs.
Memory:   1.32 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

The released ViT-S is distilled (distill_vit.py); drop path 0.1 is our choice.

Everything else, and what to lower for one GPU, is in vit_large.py.
"""

_base_ = ["vit_large.py"]

model = dict(source="vits16", drop_path=0.1)
