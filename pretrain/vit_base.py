"""DINOv3's ImageNet-1k recipe with a ViT-B/16 in place of the ViT-L.

Command:  dino-adapters pretrain pretrain/vit_base.py data.source=FOLDER --out runs/vit_base
Hardware: large GPUs.
Memory:   2.64 GB of weights, gradients, AdamW's moments and moving average, heads included;
          computed. Activations come on top: not measured.
Time:     not measured.
Reached:  not measured.

The released ViT-B is distilled (distill_vit.py); drop path 0.2 is our choice.

Everything else, and what to lower for one GPU, is in vit_large.py.
"""

_base_ = ["vit_large.py"]

model = dict(source="vitb16", drop_path=0.2)
