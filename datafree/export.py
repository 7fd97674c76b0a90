"""Writes a trained network for other programs: ONNX, torch.export's pt2, safetensors, each compared with torch."""

import sys

from datafree import cli
from datafree.config import ExportConfig
from datafree.errors import exit_on_input_error

EXAMPLES = """
python -m datafree.export runs/digits_rgal_resnet20_resnet8/seed0 --format onnx pt2 safetensors
python -m datafree.export runs/digits_rgal_resnet20_resnet8/seed0 --input bytes
python -m datafree.export resnet20.th --model cifar_resnet20 --dataset cifar10 --images noise
"""


def main() -> None:
    config, call = cli.parse(ExportConfig, sys.argv[1:], description=__doc__, examples=EXAMPLES, first="weights")
    if call.print_config:
        print(cli.to_yaml(config), end="")
        return
    config.validate()
    # It imports torch, which takes seconds; --help and mistakes in the form of options are answered before.
    from datafree.exporting.files import run

    run(config, dry_run=call.dry_run)


if __name__ == "__main__":
    exit_on_input_error(main)
