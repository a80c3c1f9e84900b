"""A trained vision transformer continued through adapters: less memory, and less to unlearn.

Command:  dino-adapters pretrain pretrain/continue_lora.py data.source=FOLDER model.source=WEIGHTS \
              monitor.labels=FEW.csv --out runs/continued
Hardware: 2 CPU cores, or a GPU.
Reached:  see pretrain/README.md.

Low-rank adapters in all blocks but the last, which is trained whole with all norms (the shape of
ExPLoRA, arXiv 2406.10973). They are merged into the weights on export.
"""

_base_ = "continue.py"
lora = dict(rank=8, open_blocks=1)
# Adapters begin at nothing and need larger steps than whole blocks: at 4e-4 and 200 steps nothing moved.
optim = dict(lr=3e-3)
model = dict(source="give model.source=WEIGHTS")
