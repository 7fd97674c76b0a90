"""The teacher's kept answers: the same as asking it, whatever is drawn, forgotten or overwritten."""
import nets
import pytest
import torch

from datafree.augment import CropFlip, shift_flip
from datafree.hooks import pooled
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
def teacher(monkeypatch):
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
def test_answers_are_those_of_the_teacher_and_each_view_is_asked_once(wanted, teacher):
    pool = pool_of(10, 10)
    cache, seen = ViewCache(teacher, wanted, 10 * CROP.count, megabytes=1), set()
    for _ in range(30):
        views, keys = draw(pool, 16)
        known = sum(key in seen for key in keys.tolist())
        found, shown = cache.features(views, keys), list(teacher.asked)
        assert cache.hit_rate() == pytest.approx(known / 16)
        assert shown == ([PASS] if known < 16 else []), "one pass of the size of few, or none"
        assert_as_asked(found, teacher.features(views), wanted)
        teacher.asked.clear()
        seen |= set(keys.tolist())
    assert len(cache) == 180 and len(seen) > 150 and cache.hit_rate() is None


def test_overwritten_images_are_asked_anew(teacher):
    pool = pool_of(4, 4)
    cache = ViewCache(teacher, EVERYTHING, 4 * CROP.count, megabytes=1)
    for _ in range(40):
        pool.add(torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.long))
        for _ in range(3):
            views, keys = draw(pool, 8)
            assert_as_asked(cache.features(views, keys), teacher.features(views))


def test_too_little_memory_costs_passes_and_no_answer_is_mixed_up(teacher):
    pool = pool_of(20, 20)
    cache = ViewCache(teacher, EVERYTHING, 20 * CROP.count, megabytes=1)
    cache.places = 7  # all views fall into few places, several of one batch into the same
    hits = 0
    for _ in range(100):
        views, keys = draw(pool, 40)
        assert_as_asked(cache.features(views, keys), teacher.features(views))
        hits += cache.hit_rate()
    assert 0 < hits < 10


def test_memory_is_bounded(teacher):
    cache = ViewCache(teacher, EVERYTHING, 10**9, megabytes=2)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (cache.values, cache.keys))
    assert 1.9e6 < held <= 2e6 and held == len(cache) * cache.bytes_per_view
    assert len(ViewCache(teacher, EVERYTHING, 12, megabytes=2)) == 12


@pytest.mark.parametrize("new", [1, PASS - 1, PASS, PASS + 1])
def test_passes_are_filled_up_to_few_sizes(new, teacher):
    cache = ViewCache(teacher, ("logits",), 1000, megabytes=1)
    views = torch.rand(new, *SHAPE)
    found = cache.features(views, torch.arange(new))
    assert teacher.asked == [PASS if new <= PASS else 2 * PASS]
    torch.testing.assert_close(found.logits, teacher.features(views).logits)


def test_half_precision_answers_come_back_as_they_were(teacher):
    cache, views = ViewCache(teacher, EVERYTHING, 100, megabytes=1), torch.rand(PASS, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        first, asked = cache.features(views, torch.arange(PASS)), teacher.features(views)
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
