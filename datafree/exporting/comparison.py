"""An exported file beside the network that it was made of: logits, answers, accuracy, size, milliseconds."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from datafree.datasets.splits import Split
from datafree.evaluators import evaluate
from datafree.exporting.onnx_file import OnnxNetwork
from datafree.exporting.torch_files import ProgramNetwork
from datafree.exporting.tracing import largest_difference
from datafree.models.factory import is_known
from datafree.network import Network
from datafree.quantizer import QuantizedModel

BATCH_SIZES = (1, 64)  # of which the latency is measured
MOST_SECONDS = 30.0  # for the latencies of one batch size
Runner = Callable[[Tensor], Tensor]
Rows = dict[str, dict[str, float]]


@torch.no_grad()
def compare(
    network: Network, files: Mapping[str, str | Path], images: Tensor, split: Split | None = None, repeats: int = 20
) -> Rows:
    """Compare ``network`` in torch with exported files of it, as a row called ``torch`` and one for each file.

    network: what the files are compared with, such as the network that they come from or its simulation. files: name of
    the row -> the file. images: (N, C, H, W) in [0, 1], for difference, agreement and latency; if a file takes bytes,
    such as bytes can hold. repeats: of each latency, as far as half a minute allows.

    Each row has ``difference`` (largest difference of a logit from torch's, over the largest logit), ``agreement`` (%
    of ``images`` to which ``network`` gives the same class), ``acc1`` (% on ``split``, if there is one), ``bytes`` (of
    the file; not in ``torch``), ``latency_ms_1`` and ``latency_ms_64`` (median time of a batch on the CPU, with the
    threads that torch uses; the runs take turns), ``latency_ms_1_iqr`` and so on (their interquartile range) and
    ``latency_ms_1_n`` (how many there were).
    """
    runners: dict[str, Runner] = {key: reloaded(path, network) for key, path in files.items()}
    with network.frozen():
        runners = {"torch": network, **runners}
        logits = {
            key: torch.cat([runner(part) for part in images.split(BATCH_SIZES[-1])]) for key, runner in runners.items()
        }
        rows = {key: _agreement(found, logits["torch"]) for key, found in logits.items()}
        if split:
            for key, runner in runners.items():
                rows[key]["acc1"] = evaluate(runner, split, BATCH_SIZES[-1], f"{key} network")["acc1"]
        runners["torch"] = network.copy().to("cpu")
    for key, path in files.items():
        rows[key]["bytes"] = Path(path).stat().st_size
    for size in BATCH_SIZES:
        batch = images[torch.arange(size) % len(images)].cpu()
        for key, times in _alternating(runners, batch, repeats).items():
            low, median, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            rows[key] |= {f"latency_ms_{size}": median, f"latency_ms_{size}_iqr": high - low}
            rows[key][f"latency_ms_{size}_n"] = len(times)
    return rows


def shown_rows(rows: Rows, names: Mapping[str, str]) -> list[dict[str, str | float]]:
    """The rows as a table shows them. names: of the networks, by row."""
    return [
        {
            "network": names[key],
            "difference": f"{row['difference']:.1e}",
            **{name: value for name, value in row.items() if name != "difference" and not name.endswith(("iqr", "_n"))},
        }
        for key, row in rows.items()
    ]


def reloaded(path: str | Path, network: Network) -> Runner:
    """What runs an exported file of ``network`` on the CPU: images (N, C, H, W) in [0, 1] -> logits (N, classes).

    Safetensors are read as :func:`datafree.load` reads them, or into a copy of the network if they state a user-defined
    one, which a file cannot build.
    """
    kind = Path(path).suffix
    if kind == ".onnx":
        return OnnxNetwork(path)
    if kind == ".pt2":
        return ProgramNetwork(path)
    model = network.model.model if isinstance(network.model, QuantizedModel) else network.model
    loaded = Network.from_file(path, "" if is_known(network.metadata.get("model", "")) else model)
    loaded = loaded.restricted_to(range(network.num_classes)).freeze()
    return lambda images: loaded(images.cpu()).to(images.device)


def _agreement(found: Tensor, expected: Tensor) -> dict[str, float]:
    same = found.argmax(1) == expected.argmax(1)
    return {"difference": largest_difference(found, expected), "agreement": 100 * same.float().mean().item()}


def _alternating(runners: Mapping[str, Runner], batch: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` passes of each runner, which take turns, so that other load meets all alike."""
    times: dict[str, list[float]] = {key: [] for key in runners}
    begun = time.perf_counter()
    for _ in range(repeats):
        for key, runner in runners.items():
            runner(batch)  # fills the caches, and the threads of the one before go to sleep
            start = time.perf_counter()
            runner(batch)
            times[key].append(1000 * (time.perf_counter() - start))
        if time.perf_counter() - begun > MOST_SECONDS:
            break
    return times
