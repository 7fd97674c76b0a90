"""The files of a network in several formats, compared with it in torch: the program, and its parts for other code."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from datafree.config import ExportConfig, Files
from datafree.errors import InputError, printable
from datafree.exporting.comparison import Rows, compare, shown_rows
from datafree.exporting.images import BATCH, Sample, images_of_run, sample_images
from datafree.exporting.integers import write_integers
from datafree.exporting.onnx_file import write_onnx
from datafree.exporting.packages import require_packages
from datafree.exporting.subject import Subject, load_subject
from datafree.exporting.torch_files import write_program, write_safetensors
from datafree.exporting.tracing import INPUTS, traced
from datafree.files import write_text, writing
from datafree.logger import table
from datafree.network import Network
from datafree.plan import describe_findings, describe_normalisation
from datafree.quantizer import QuantizedModel
from datafree.runtime import set_threads
from datafree.trial import HALF

# Largest difference of a logit, relative to the largest one: of a file, of an integer network, of a network in 16 bits.
IN_FLOAT, OF_INTEGERS, OF_HALF = 1e-4, 0.1, 3e-2
INTEGERS = "model_int8.onnx"
WHERE_NOT = ", or give another folder by --out"


def export_network(
    network: Network,
    folder: str | Path,
    formats: Sequence[str] = ("onnx",),
    takes: str = "floats",
    calibration: Iterable[Tensor] = (),
) -> dict[str, Path]:
    """Write ``network`` into ``folder``, which is created, in each of ``formats`` -> name of each file, and its path.

    takes: what the onnx and pt2 files take, of :data:`datafree.exporting.tracing.INPUTS`. calibration: batches of
    images (N, C, H, W) in [0, 1] that set the ranges of the integer network that a quantised one becomes in ONNX.
    Raises InputError for a missing package, and for a network that a format cannot hold.
    """
    require_formats(network, formats)
    is_quantised = isinstance(network.model, QuantizedModel)
    with writing(folder, after=WHERE_NOT):
        Path(folder).mkdir(parents=True, exist_ok=True)
    program = None if is_quantised or set(formats) == {"safetensors"} else traced(network, takes)
    paths = {}
    for kind in formats:
        name = INTEGERS if kind == "onnx" and is_quantised else f"model.{kind}"
        path = paths[name] = Path(folder) / name
        if kind == "safetensors":
            write_safetensors(network, path)
        elif kind == "pt2":
            write_program(network, path, takes, program)
        elif is_quantised:
            write_integers(network, path, calibration, takes)
        else:
            write_onnx(network, path, takes, program=program)
    return paths


def require_formats(network: Network, formats: Sequence[str]) -> None:
    """Raise InputError for a missing package, and for a format that cannot hold a quantised network."""
    require_packages(formats)
    if not isinstance(network.model, QuantizedModel):
        return
    protocol = network.model.protocol
    if "pt2" in formats:
        raise InputError(
            f"the {network.name} is quantised, which its own code does not say, so that pt2 would have it in float; "
            "export it as onnx (8 bits) or safetensors"
        )
    if "onnx" in formats and (protocol.w_bits, protocol.a_bits, protocol.first_last_bits or 8) != (8, 8, 8):
        raise InputError(
            f"the {network.name} is quantised, but no integer kernel of onnxruntime has these bits; export it as "
            "safetensors, whose network simulates them"
        )


def run(config: ExportConfig, dry_run: bool = False) -> None:
    """The program: export the network that the options name, compare and print. Raises InputError above tolerance."""
    files, comparison = config.files, config.comparison
    require_packages(files.format)
    set_threads(comparison.threads)
    subject = load_subject(config.trained, comparison.data_root)
    network = subject.network
    require_formats(network, files.format)
    sample = sample_images(subject, comparison.images, comparison.data_root)
    needs_ranges = isinstance(network.model, QuantizedModel) and "onnx" in files.format
    calibration = images_of_run(subject).images if needs_ranges else sample.images[:0]
    folder = folder_of_files(config)
    print("\n".join(map(printable, describe_export(subject, files, folder, sample, len(calibration)))))
    if dry_run:
        return
    with _apart(folder) as place:
        paths = export_network(network, place, files.format, files.input, calibration.split(BATCH))
        rows = compare(network, paths, sample.images, sample.split, comparison.repeats)
        stated = {"images": sample.words, "input": INPUTS[files.input], **rows}
        paths["comparison.json"] = place / "comparison.json"
        write_text(paths["comparison.json"], json.dumps(stated, indent=2) + "\n", after=WHERE_NOT)
    print(table(shown_rows(rows, {key: key for key in rows})))
    require_tolerance(rows, comparison.tolerance, place, OF_HALF if network.trial.dtype in HALF else IN_FLOAT)
    with writing(folder, after=WHERE_NOT):
        for name, path in paths.items():
            path.replace(folder / name)
        shutil.rmtree(place)
    print(f"Everything is in {folder}")


@contextmanager
def _apart(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``, for files that are not compared yet, so that only good ones replace earlier ones; it
    is removed if the block fails."""
    with writing(folder, after=WHERE_NOT):
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix="unchecked-", dir=folder))
    try:
        yield place
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def folder_of_files(config: ExportConfig) -> Path:
    """The folder that is given, or ``export`` in the folder of the run, or ``NAME_export`` beside a file of weights."""
    if config.files.out:
        return Path(config.files.out)
    given = Path(config.trained.weights)
    return given / "export" if given.is_dir() else given.with_name(f"{given.stem}_export")


def describe_export(subject: Subject, files: Files, folder: Path, sample: Sample, calibrating: int) -> list[str]:
    """The plan. calibrating: number of images that set the ranges of an integer network."""
    network = subject.network
    return [
        f"Plan: exporting the {network.name} in {subject.file} as {', '.join(files.format)} into {folder}.",
        describe_normalisation(network),
        *describe_findings(network),
        *(
            [f"Input: {INPUTS[files.input]}; the normalisation is inside."]
            if set(files.format) != {"safetensors"}
            else []
        ),
        *(
            [f"The onnx and pt2 files compute in float32, the network in torch in {str(network.trial.dtype)[6:]}."]
            if network.trial.dtype != torch.float32 and set(files.format) != {"safetensors"}
            else []
        ),
        *([f"Ranges are set by {calibrating:,} images of the run."] if calibrating else []),
        *subject.notes,
        f"Compared on {sample.words}.",
    ]


def require_tolerance(rows: Rows, tolerance: float | None, folder: Path, in_float: float = IN_FLOAT) -> None:
    """Raise InputError if the logits of a file differ from torch's by more than ``tolerance``, or than its kind may.

    folder: where the files are. in_float: how much a file that is no integer network may differ.
    """
    for name, row in rows.items():
        most = tolerance if tolerance is not None else OF_INTEGERS if name == INTEGERS else in_float
        if name != "torch" and not row["difference"] <= most:  # NaN included
            raise InputError(
                f"{name} gives other logits than torch, by {row['difference']:.1e} of the largest, above the tolerance "
                f"of {most:g}; it is left in {folder}: do not use it before you know why"
            )
