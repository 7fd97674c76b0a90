"""What TensorBoard shows of a run: names of its curves in few groups, charts, and the table of options.

Summaries are made by torch's functions; importing this module imports neither torch nor TensorBoard.
"""

from collections.abc import Mapping
from typing import Any

TAGS = {
    **{key: f"accuracy/{key}" for key in ("acc1", "acc5", "best_acc1", "average_acc1", "forgetting", "classes")},
    "loss": "accuracy/test_loss",
    "images": "images/synthesised",
    "lr": "student/lr",
    "view_cache/hit_rate": "student/view_cache_hit_rate",
}
# Group -> chart -> the curves in it, as regular expressions.
CHARTS = {
    "accuracy": {
        "on the test set (%)": ["accuracy/acc[15]", "accuracy/best_acc1", "accuracy/average_acc1"],
        "test loss": ["accuracy/test_loss"],
    },
    "terms of the losses": {
        "student": ["student/(?!lr|view_cache).*"],
        "synthesis": ["synthesis/(?!triplet_weight).*"],
    },
    "images": {
        "fractions": ["images/.*(agreement|confidence|duplicates|entropy)", "images/anchors_.*"],
        "distances": ["images/.*distance.*"],
    },
    "cost": {"seconds": ["seconds/.*"], "images synthesised": ["images/synthesised"]},
}


def tag_of(key: str) -> str:
    """The name of the curve of a metric; a slash parts its group from the rest."""
    return TAGS.get(key) or (key if "/" in key else f"other/{key}")


def description(config_yaml: str, environment: Mapping[str, Any], options: Mapping[str, Any]) -> list[Any]:
    """Summaries that describe a run at its beginning: its options and provenance as text, the charts, and ``options``,
    on which the result depends, for the table of hyperparameters."""
    from torch.utils.tensorboard.summary import custom_scalars, text

    provenance = "".join(f"{key}: {value}\n" for key, value in environment.items())
    charts = {group: {name: ["Multiline", tags] for name, tags in charts.items()} for group, charts in CHARTS.items()}
    texts = {"config.yaml": config_yaml, "env.json": provenance}
    shown = [text(name, "".join(f"    {line}\n" for line in content.splitlines())) for name, content in texts.items()]
    return [*shown, custom_scalars(charts), *_hyperparameters(options)[:2]]


def end_of(options: Mapping[str, Any]) -> list[Any]:
    """Summaries that say that the run with these ``options`` has ended."""
    return _hyperparameters(options)[2:]


def _hyperparameters(options: Mapping[str, Any]) -> list[Any]:
    from torch.utils.tensorboard.summary import hparams

    values = {name: value if type(value) in (int, float) else str(value) for name, value in options.items()}
    return list(hparams(values, {TAGS["acc1"]: None, TAGS["best_acc1"]: None}))
