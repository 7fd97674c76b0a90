"""The teacher's kept answers: the same as asking it, whatever is drawn, forgotten or overwritten."""

import nets
import pytest
import torch
from torch import nn

import datafree_kd
from datafree import config
from datafree.augment import CropFlip, shift_flip
from datafree.hooks import pooled, sees_images_alone
from datafree.learners.distill import DistillLearner
from datafree.models import MODELS
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.view_cache import PASS, ViewCache

SHAPE, CLASSES, CPU = (3, 8, 8), 5, torch.device("cpu")
EVERYTHING = ("logits", "embed", "stages")
CROP = CropFlip(1, True)  # 18 views an image


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def oracle(monkeypatch):
    """A frozen network that counts in ``asked`` how many views it was shown at a time."""
    net = Network(nets.tiny(CLASSES, 3), SHAPE, (0.4,) * 3, (0.2,) * 3).freeze()
    features, net.asked = net.features, []
    monkeypatch.setattr(net, "features", lambda views: net.asked.append(len(views)) or features(views))
    return net


def pool_of(capacity, count):
    pool = ImagePool(capacity, SHAPE, CLASSES, CPU)
    pool.add(torch.rand(count, *SHAPE), torch.arange(count) % CLASSES)
    return pool


def draw(pool, n):
    images, _, numbers = pool.sample(n)
    shift, flip = CROP.draw(n, CPU)
    return shift_flip(images, shift, flip), numbers * CROP.count + CROP.number(shift, flip)


def assert_as_asked(found, asked, wanted=EVERYTHING):
    for name in ("logits", "embed"):
        assert (getattr(found, name) is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(getattr(found, name), getattr(asked, name))
    assert len(found.stages) == (len(asked.stages) if "stages" in wanted else 0)
    for ours, theirs in zip(found.stages, asked.stages):
        torch.testing.assert_close(ours, pooled(theirs))


@pytest.mark.parametrize("wanted", [EVERYTHING, ("logits",), ("logits", "stages"), ("embed", "logits")])
def test_answers_are_those_of_the_teacher_and_each_view_is_asked_once(wanted, oracle):
    pool = pool_of(10, 10)
    cache, seen = ViewCache(oracle, wanted, 10 * CROP.count, megabytes=1), set()
    for _ in range(30):
        views, keys = draw(pool, 16)
        known = sum(key in seen for key in keys.tolist())
        found, shown = cache.features(views, keys), list(oracle.asked)
        assert cache.hit_rate() == pytest.approx(known / 16)
        assert shown == ([PASS] if known < 16 else []), "one pass of the size of few, or none"
        assert_as_asked(found, oracle.features(views), wanted)
        oracle.asked.clear()
        seen |= set(keys.tolist())
    assert len(cache) == 180 and len(seen) > 150 and cache.hit_rate() is None


def test_overwritten_images_are_asked_anew(oracle):
    pool = pool_of(4, 4)
    cache = ViewCache(oracle, EVERYTHING, 4 * CROP.count, megabytes=1)
    for _ in range(40):
        pool.add(torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.long))
        for _ in range(3):
            views, keys = draw(pool, 8)
            assert_as_asked(cache.features(views, keys), oracle.features(views))


def test_too_little_memory_costs_passes_and_no_answer_is_mixed_up(oracle):
    pool = pool_of(20, 20)
    cache = ViewCache(oracle, EVERYTHING, 20 * CROP.count, megabytes=1)
    cache.places = 7  # all views fall into few places, several of one batch into the same
    hits = 0
    for _ in range(100):
        views, keys = draw(pool, 40)
        assert_as_asked(cache.features(views, keys), oracle.features(views))
        hits += cache.hit_rate()
    assert 0 < hits < 10


def test_memory_is_bounded(oracle):
    cache = ViewCache(oracle, EVERYTHING, 10**9, megabytes=2)
    held = cache.values[:-1].nbytes + cache.keys.nbytes
    assert 1.9e6 < held <= 2e6 and held == len(cache) * cache.bytes_per_view
    assert len(ViewCache(oracle, EVERYTHING, 12, megabytes=2)) == 12


@pytest.mark.parametrize("new", [1, PASS - 1, PASS, PASS + 1])
def test_passes_are_filled_up_to_few_sizes(new, oracle):
    cache = ViewCache(oracle, ("logits",), 1000, megabytes=1)
    views = torch.rand(new, *SHAPE)
    found = cache.features(views, torch.arange(new))
    assert oracle.asked == [PASS if new <= PASS else 2 * PASS]
    torch.testing.assert_close(found.logits, oracle.features(views).logits)


def test_half_precision_answers_come_back_as_they_were(oracle):
    cache, views = ViewCache(oracle, EVERYTHING, 100, megabytes=1), torch.rand(PASS, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        first, asked = cache.features(views, torch.arange(PASS)), oracle.features(views)
        again = cache.features(views, torch.arange(PASS))
    assert asked.logits.dtype == torch.bfloat16
    assert torch.equal(first.logits, asked.logits.float()) and torch.equal(again.logits, first.logits)


def test_a_number_of_a_view_means_one_view():
    steps = torch.arange(-1, 2)
    shift = torch.cartesian_prod(steps, steps).repeat(2, 1)
    flip = torch.arange(18) >= 9
    assert sorted(CROP.number(shift, flip).tolist()) == list(range(18)) and CROP.count == 18
    still = CropFlip(1, False)
    assert sorted(still.number(shift[:9], flip[:9]).tolist()) == list(range(9)) and still.count == 9


@pytest.mark.parametrize("name", ["resnet8", "wrn16_1", "vgg8", "mobilenetv2"])
def test_passes_of_all_sizes_round_alike_on_the_cpu(name):
    """On this a resumed run rests, which asks again for what it had known."""
    net = Network(MODELS[name](CLASSES), (3, 32, 32), (0.4,) * 3, (0.2,) * 3).freeze()
    views = torch.rand(128, 3, 32, 32)
    with torch.no_grad():
        whole = net.features(views)
        for n in (PASS, 2 * PASS, 3 * PASS):
            part = net.features(views[:n])
            assert torch.equal(part.logits, whole.logits[:n]) and torch.equal(part.embed, whole.embed[:n])


def test_a_learner_refuses_a_cache_that_could_not_answer(oracle):
    student = Network(nets.small(CLASSES, 3), SHAPE, (0.4,) * 3, (0.2,) * 3)
    cache = ViewCache(oracle, EVERYTHING, 100, megabytes=1)
    for settings in (config.Distill(mixup=0.5), config.Distill(gram_loss=1.0)):
        with pytest.raises(ValueError, match="view cache"):
            DistillLearner(student, oracle, CROP, settings, config.Relation(), 10, cache=cache)


def test_a_network_that_compares_the_images_of_a_batch_is_known():
    assert sees_images_alone(nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3)))
    assert not sees_images_alone(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


@pytest.mark.parametrize(
    "words, told",
    [
        ((), "kept for 1,152 of 1,152 views"),
        (("--view_cache", 0), None),
        (("--mixup", 0.5), None),
        (("--gram_loss", 1), None),
        (("--view_cache", 10**9), "kept for 1,152 of 1,152 views"),
        (("--view_cache", 1, "--epochs", 4000), "kept for 4,807 of 1,152,000 views"),
    ],
)
def test_the_plan_tells_how_many_views_are_kept(words, told, distil, capsys):
    distil("--dry_run", *words)
    printed = capsys.readouterr().out
    assert told in printed if told else "views (" not in printed


def test_a_view_cache_without_room_or_use_is_refused(distil, refused, monkeypatch):
    monkeypatch.setattr(datafree_kd, "free_memory", lambda device: 12 * 10**6)
    assert "--view_cache 20 does not fit" in refused(distil, "--dry_run", "--view_cache", 20, "--epochs", 4000)
    for use in (("--mixup", 0.5), ("--gram_loss", 1)):
        assert "--view_cache" in refused(distil, "--dry_run", "--view_cache", 10, *use, code=2)
