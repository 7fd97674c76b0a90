"""The number of epochs that fit into a time budget: python -m benchmarks.budget SECONDS FOLDER...

By the mean seconds that an epoch of the finished runs below the folders took for synthesis and student training. So all
seeds of a comparison have the same epochs, unlike with --budget, by which every run measures itself.
"""

import statistics
import sys

from datafree.arguments import usage
from datafree.errors import OptionError, exit_on_input_error
from datafree.report import read_summaries


def epochs_within(seconds, summaries):
    """The nearest number of epochs, and at least one beyond the warm-up, so that the student is trained."""
    epoch = statistics.fmean(
        (run.get("synthesis_s", 0) + run["student_s"]) / run.get("epochs", run["options"]["epochs"])
        for run in summaries  # those with --budget state the epochs that they had
    )
    return max(1 + summaries[0]["options"].get("warmup", 0), round(seconds / epoch))


def main():
    usage(__doc__, at_least=2)
    try:
        seconds = float(sys.argv[1])
    except ValueError:
        raise OptionError(f"SECONDS cannot be {sys.argv[1]!r}; give a number") from None
    print(epochs_within(seconds, read_summaries(sys.argv[2:])))


if __name__ == "__main__":
    exit_on_input_error(main)
