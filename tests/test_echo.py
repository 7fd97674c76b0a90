"""Views that are used again: they come back with their own answers, as often as they should."""

import nets
import pytest
import torch
from parts import CLASSES, SHAPE, count_calls, make_learner, network, options

from datafree.augment import CropFlip
from datafree.echo import KEPT, Echo
from datafree.features import FeatureRows, Features
from datafree.network import Network
from datafree.pool import Batch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def echo_of(times=2, kept=KEPT):
    """Echoes of logits alone, for images of one pixel."""
    return Echo(FeatureRows(network().tap, ["logits"]), times, (1, 1, 1), CPU, kept)


def numbered(start, count):
    """Views whose pixel is their number, and answers that are the same number."""
    numbers = torch.arange(start, start + count, dtype=torch.float32)
    return numbers.view(-1, 1, 1, 1), Features(logits=numbers[:, None].expand(-1, CLASSES))


def steps(echo, count, new):
    """The numbers of the views of each step."""
    found = []
    for step in range(count):
        views, features = echo(*numbered(step * new, new))
        assert torch.equal(features.logits, views.flatten()[:, None].expand(-1, CLASSES))
        found.append(views.flatten().long())
    return found


@pytest.mark.parametrize("times", [2, 3])
def test_a_view_is_used_so_many_times_on_average_and_always_with_its_answer(times):
    found = steps(echo_of(times, kept=40), 500, new=8)
    for step, numbers in enumerate(found):
        assert numbers[:8].tolist() == list(range(8 * step, 8 * step + 8)) and len(numbers) == 8 * times
        assert numbers.min() >= max(0, 8 * (step + 1) - 40)  # the last ones that are kept
    uses = torch.cat(found).bincount()[40:-40].float()
    assert abs(uses.mean() - times) < 0.02 and uses.max() > times


def test_more_new_views_than_are_kept():
    for numbers in steps(echo_of(2, kept=3), 4, new=8):
        assert all(number % 8 >= 5 for number in numbers[8:])


def test_a_learner_asks_the_teacher_only_about_new_views_and_learns_from_its_answers(monkeypatch):
    given = options(echo=4, mixup=0.5, cd_loss=1.0, striplet=0.1, striplet_sampling="uniform", pair_sample=True)
    learner = make_learner(given, network(nets.tiny), network(nets.small), CropFlip(1, True))
    passes = count_calls(monkeypatch, Network, "features")
    for _ in range(3):
        views, kept = learner._views(Batch(torch.rand(2, *SHAPE)))
        assert len(views) == 16 and [len(args[1]) for args, _ in passes] == [4]
        passes.clear()
        answers = learner.teacher.features(views)
        passes.clear()
        torch.testing.assert_close(kept.logits, answers.logits)
        torch.testing.assert_close(list(kept.pooled), list(answers.pooled))
    assert set(learner.step(Batch(torch.rand(2, *SHAPE)))) == {"kd", "cd_loss", "striplet"}


def test_an_echo_that_is_loaded_goes_on_alike():
    first, second = echo_of(kept=20), echo_of(kept=20)
    steps(first, 3, new=6)
    second.load_state_dict(first.state_dict())
    for echo in (first, second):
        torch.manual_seed(1)
        echo.found = steps(echo, 5, new=6)
    assert all(map(torch.equal, first.found, second.found))


@pytest.mark.parametrize(
    "damage",
    [
        dict(views="none"),
        dict(added=2.0),
        dict(added=-1),
        dict(added=9),
        dict(views=torch.ones(6, 1, 2, 2)),
        dict(answers=torch.ones(6, 1)),
        dict(answers=torch.ones(6, CLASSES, dtype=torch.long)),
    ],
    ids=str,
)
def test_what_is_no_echo_is_refused(damage):
    echo = echo_of()
    steps(echo, 1, new=6)
    with pytest.raises(ValueError):
        echo_of().load_state_dict({**echo.state_dict(), **damage})


def test_the_plan_states_it_and_no_effect_or_a_wrong_batch_is_refused(distil, refused, capsys):
    distil("--dry_run", "--echo", 4, "--batch_size", 32, "--pair_sample", "false")
    assert "8 of the 32 views of a student step are new, the others are drawn from the last 1,024 (1 MB)" in (
        capsys.readouterr().out
    )
    assert "give --batch_size 30 or 33" in refused(distil, "--dry_run", "--echo", 3, "--batch_size", 32, code=2)
    assert "give --batch_size 3" in refused(distil, "--dry_run", "--echo", 3, "--batch_size", 2, code=2)
    assert "--echo cannot keep whole maps" in refused(distil, "--dry_run", "--echo", 2, "--gram_loss", 1, code=2)
