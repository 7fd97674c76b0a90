"""Cached outputs of the teacher: equal to its outputs, whichever views are sampled, dropped or overwritten."""

import nets
import pytest
import torch
from parts import make_learner, network, options
from torch import nn

from datafree import view_cache
from datafree.augment import CropFlip, shift_flip
from datafree.batchnorm import is_batch_independent
from datafree.errors import InputError
from datafree.features import pooled
from datafree.models import MODELS
from datafree.pool import ImagePool
from datafree.view_cache import PAD_TO, ViewCache

SHAPE, CLASSES, CPU = (3, 8, 8), 5, torch.device("cpu")
EVERYTHING = ("logits", "embed", "pooled")
CROP = CropFlip(1, True)  # 18 views of an image


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def oracle(monkeypatch):
    """A frozen network that lists in ``batches`` the number of views of each of its forward passes."""
    net = network(nets.tiny, SHAPE, CLASSES).freeze()
    features, net.batches = net.features, []
    monkeypatch.setattr(net, "features", lambda views: net.batches.append(len(views)) or features(views))
    return net


def pool_of(capacity, count):
    pool = ImagePool(capacity, SHAPE, CLASSES, CPU)
    pool.add(torch.rand(count, *SHAPE), torch.arange(count) % CLASSES)
    return pool


def sample_views(pool, n):
    images, _, ids = pool.sample(n)
    shift, flip = CROP.draw(n, CPU)
    return shift_flip(images, shift, flip), ids * CROP.count + CROP.number(shift, flip)


def assert_equal(found, expected, cached=EVERYTHING):
    for name in EVERYTHING:
        if name in cached:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        else:
            with pytest.raises(InputError, match=f"'{name}'"):
                getattr(found, name)
    if "pooled" in cached:
        assert len(found.pooled) == len(expected.stages)
        for ours, theirs in zip(found.pooled, expected.stages):
            torch.testing.assert_close(ours, pooled(theirs))
    with pytest.raises(InputError, match="'stages'"):
        found.stages


@pytest.mark.parametrize("cached", [EVERYTHING, ("logits",), ("logits", "pooled"), ("embed", "logits")])
def test_outputs_are_those_of_the_teacher_which_runs_once_on_each_view(cached, oracle):
    pool = pool_of(10, 10)
    cache, seen = ViewCache(oracle, cached, 10 * CROP.count, megabytes=1), set()
    for _ in range(30):
        views, keys = sample_views(pool, 16)
        known = sum(key in seen for key in keys.tolist())
        found, batches = cache.features(views, keys), list(oracle.batches)
        assert cache.hit_rate() == pytest.approx(known / 16)
        assert batches == ([PAD_TO] if known < 16 else []), "one padded forward pass, or none"
        assert_equal(found, oracle.features(views), cached)
        oracle.batches.clear()
        seen |= set(keys.tolist())
    assert len(cache) == 180 and len(seen) > 150 and cache.hit_rate() is None


def test_the_teacher_runs_again_on_overwritten_images(oracle):
    pool = pool_of(4, 4)
    cache = ViewCache(oracle, EVERYTHING, 4 * CROP.count, megabytes=1)
    for _ in range(40):
        pool.add(torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.long))
        for _ in range(3):
            views, keys = sample_views(pool, 8)
            assert_equal(cache.features(views, keys), oracle.features(views))


def test_too_little_memory_costs_forward_passes_and_mixes_no_outputs_up(oracle):
    pool = pool_of(20, 20)
    cache = ViewCache(oracle, EVERYTHING, 20 * CROP.count, megabytes=1)
    cache.places = 7  # all views share few places, and several of one batch have the same
    hits = 0
    for _ in range(100):
        views, keys = sample_views(pool, 40)
        assert_equal(cache.features(views, keys), oracle.features(views))
        hits += cache.hit_rate()
    assert 0 < hits < 10


def test_memory_is_bounded(oracle):
    cache = ViewCache(oracle, EVERYTHING, 10**9, megabytes=2)
    held = cache.values[:-1].nbytes + cache.keys.nbytes
    assert 1.9e6 < held <= 2e6 and held == len(cache) * cache.bytes_per_view
    assert len(ViewCache(oracle, EVERYTHING, 12, megabytes=2)) == 12


@pytest.mark.parametrize("new", [1, PAD_TO - 1, PAD_TO, PAD_TO + 1])
def test_misses_are_padded_to_few_sizes(new, oracle):
    cache = ViewCache(oracle, ("logits",), 1000, megabytes=1)
    views = torch.rand(new, *SHAPE)
    found = cache.features(views, torch.arange(new))
    assert oracle.batches == [PAD_TO if new <= PAD_TO else 2 * PAD_TO]
    torch.testing.assert_close(found.logits, oracle.features(views).logits)


def test_half_precision_outputs_are_returned_unchanged(oracle):
    cache, views = ViewCache(oracle, EVERYTHING, 100, megabytes=1), torch.rand(PAD_TO, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        first, expected = cache.features(views, torch.arange(PAD_TO)), oracle.features(views)
        again = cache.features(views, torch.arange(PAD_TO))
    assert expected.logits.dtype == torch.bfloat16
    assert torch.equal(first.logits, expected.logits.float()) and torch.equal(again.logits, first.logits)


def test_every_view_has_its_own_number():
    steps = torch.arange(-1, 2)
    shift = torch.cartesian_prod(steps, steps).repeat(2, 1)
    flip = torch.arange(18) >= 9
    assert sorted(CROP.number(shift, flip).tolist()) == list(range(18)) and CROP.count == 18
    unflipped = CropFlip(1, False)
    assert sorted(unflipped.number(shift[:9], flip[:9]).tolist()) == list(range(9)) and unflipped.count == 9


@pytest.mark.parametrize("name", ["resnet8", "wrn16_1", "vgg8", "mobilenetv2"])
def test_batches_of_all_sizes_round_alike_on_the_cpu(name):
    """A resumed run, whose cache is empty at first, depends on this."""
    net = network(MODELS[name], (3, 32, 32), CLASSES).freeze()
    views = torch.rand(128, 3, 32, 32)
    with torch.no_grad():
        whole = net.features(views)
        for n in (PAD_TO, 2 * PAD_TO, 3 * PAD_TO):
            part = net.features(views[:n])
            assert torch.equal(part.logits, whole.logits[:n]) and torch.equal(part.embed, whole.embed[:n])


def test_a_learner_that_reads_whole_maps_refuses_a_cache():
    learner, pool = (
        make_learner(options(gram_loss=1.0), network(nets.tiny, SHAPE, CLASSES), augment=CROP),
        pool_of(8, 8),
    )
    assert learner.cached_fields == ()
    learner.cache = ViewCache(learner.teacher, EVERYTHING, 8 * CROP.count, megabytes=1)
    with pytest.raises(InputError, match="'stages'"):
        learner.step(pool.sample(8))


def test_a_learner_of_blended_views_names_no_field_to_cache():
    assert make_learner(options(mixup=0.5), network(nets.tiny, SHAPE, CLASSES)).cached_fields == ()


def test_a_network_whose_outputs_depend_on_the_batch_is_known():
    assert is_batch_independent(nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3)))
    assert not is_batch_independent(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


@pytest.mark.parametrize(
    "words, stated",
    [
        ((), "View cache: 1,152 of 1,152 views"),
        (("--view_cache", 0), None),
        (("--mixup", 0.5), None),
        (("--gram_loss", 1), None),
        (("--view_cache", 10**9), "View cache: 1,152 of 1,152 views"),
        (("--view_cache", 1, "--epochs", 4000), "View cache: 4,807 of 1,152,000 views"),
    ],
)
def test_the_plan_states_how_many_views_are_cached(words, stated, distil, capsys):
    distil("--dry_run", *words)
    printed = capsys.readouterr().out
    assert stated in printed if stated else "View cache" not in printed


def test_a_view_cache_without_room_or_use_is_refused(distil, refused, monkeypatch):
    monkeypatch.setattr(view_cache, "free_memory", lambda device: 12 * 10**6)
    assert "--view_cache 20 does not fit" in refused(distil, "--dry_run", "--view_cache", 20, "--epochs", 4000)
    for use in (("--mixup", 0.5), ("--gram_loss", 1), ("--at_loss", 1)):
        assert "--view_cache" in refused(distil, "--dry_run", "--view_cache", 10, *use, code=2)


def test_memory_that_the_system_refuses_is_one_sentence(oracle, monkeypatch):
    """As under a limit of a process's memory, which is less than what is free."""
    monkeypatch.setattr(torch, "empty", lambda *size, **options: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(InputError, match="out of memory during allocation of the view cache; lower --view_cache"):
        ViewCache(oracle, ["logits"], 10, 1)


def test_a_cache_of_another_size_knows_nothing_and_one_at_its_limit_keeps_what_it_knows(oracle):
    cache, views, keys = ViewCache(oracle, ["logits"], 40, 1), torch.rand(4, *SHAPE), torch.arange(4)
    cache.features(views, keys)
    for possible, known in ((60, 0), (10**9, 0), (2 * 10**9, 4)):
        cache.resize(possible)
        assert (cache.keys[keys % len(cache)] == keys).sum() == known and cache.possible == possible
        assert len(cache) == min(possible, 10**6 // cache.bytes_per_view)
        cache.features(views, keys)
