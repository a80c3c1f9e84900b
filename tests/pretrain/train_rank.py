"""One process of a training job: `train_rank.py RECIPE.json FOLDER [STOP]`.

Run by its path, alone or by torchrun. With STOP, the process dies as by `kill -9` in front of that
step.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    import torch

    from dino_adapters.pretrain import loop, pretrain
    from dino_adapters.recipes.pretrain import PretrainRecipe
    from dino_adapters.runtime.runfolder import RunFolder

    torch.set_num_threads(1)
    told, folder, *rest = sys.argv[1:]
    recipe = PretrainRecipe.model_validate(json.loads(Path(told).read_text(encoding="utf-8")))
    step = loop.one_step

    def dying(run, crops, knobs):
        if rest and knobs.step == int(rest[0]):
            os._exit(9)
        return step(run, crops, knobs)

    loop.one_step = dying
    pretrain(recipe, RunFolder(Path(folder)), resume=True, quiet=True)


if __name__ == "__main__":
    main()
