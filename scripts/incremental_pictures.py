"""The replayed images of a finished run of datafree_incremental.py beside real ones:

python scripts/incremental_pictures.py RUN PICTURE.png

RUN is the folder of a run that keeps a pool of images (abd_inversion, rgal). Each row is an old class of the last task:
left synthetic images of it, right images of the test set.
"""

import json
import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import registry  # noqa: E402, F401  makes registered data sets known
from datafree import checkpoint  # noqa: E402
from datafree.arguments import usage  # noqa: E402
from datafree.datasets.loading import load_split, resolve_card  # noqa: E402
from datafree.errors import InputError, exit_on_input_error  # noqa: E402
from datafree.grids import draw_grid  # noqa: E402

EACH = 6  # images of a kind in a row


def main() -> None:
    usage(__doc__, at_least=2)
    run, picture = Path(sys.argv[1]), sys.argv[2]
    results = json.loads((run / "matrix.json").read_text(encoding="utf-8"))
    last = checkpoint.load(run / f"task_{len(results['tasks']) - 1:02d}" / "checkpoints" / "last.pth")
    if "pool" not in last["source"]:
        raise InputError(f"{run} keeps no images; name a run of a method that fills a pool")
    pool = last["source"]["pool"]
    data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    card = resolve_card(data["dataset"], data["data_root"], data["card"], image_size=data["image_size"])
    test = load_split(card, data["data_root"], "test", download=False)
    images, labels = next(test.batches(len(test)))
    rows, names = [], []
    for output, (card_class, name) in enumerate(zip(results["class_order"], results["classes"])):
        synthetic = pool["images"][pool["targets"] == output][:EACH].float() / 255
        if len(synthetic) == EACH:
            rows += [synthetic, images[labels == card_class][:EACH]]
            names.append(name)
    draw_grid(torch.cat(rows), 2 * EACH, names).save(picture)
    print(f"Wrote {picture}")


if __name__ == "__main__":
    exit_on_input_error(main)
