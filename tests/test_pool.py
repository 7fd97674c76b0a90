"""The image pool: a ring buffer of bytes, sampled without replacement, balanced on request, and saved as a whole."""

import numpy as np
import pytest
import torch

from datafree.errors import InputError
from datafree.pool import ImagePool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def numbered(first, count, classes=4):
    """Images (count, 1, 2, 2) of one byte each, their id, and the class of this id."""
    ids = torch.arange(first, first + count)
    return (ids.float() / 255).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), ids % classes


def ids_of(images):
    return (images[:, 0, 0, 0] * 255).round().long()


def filled(capacity, count, batch=3, classes=4):
    pool = ImagePool(capacity, (1, 2, 2), classes, CPU)
    for first in range(0, count, batch):
        pool.add(*numbered(first, min(batch, count - first), classes))
    return pool


def held(pool):
    images, targets, _ = pool.sample(len(pool))
    assert (targets == ids_of(images) % pool.num_classes).all()
    return sorted(ids_of(images).tolist())


@pytest.mark.parametrize("batch", [1, 3, 4, 10])
@pytest.mark.parametrize("count", [0, 3, 9, 10, 11, 25])
def test_the_oldest_are_overwritten(count, batch):
    pool = filled(10, count, batch)
    assert len(pool) == min(count, 10) and pool.added == count
    if count:
        assert held(pool) == list(range(max(0, count - 10), count))


@pytest.mark.parametrize("count", [4, 10, 11, 37])
def test_an_image_keeps_its_id(count):
    pool = filled(10, count)
    batch = pool.sample(30)
    assert (batch.ids == ids_of(batch.images)).all() and batch.ids.min() >= count - len(pool)


@pytest.mark.parametrize("before, count", [(0, 11), (0, 25), (3, 20), (7, 10), (13, 27)])
def test_a_batch_larger_than_the_pool_leaves_its_last_images(before, count):
    pool = filled(10, before)
    pool.add(*numbered(before, count))
    assert held(pool) == list(range(before + count - 10, before + count)) and pool.added == before + count
    pool.add(*numbered(before + count, 4))
    assert held(pool) == list(range(before + count - 6, before + count + 4))


def test_bytes_are_returned_exactly():
    values = np.random.default_rng(0).integers(0, 256, (32, 3, 4, 6), dtype=np.uint8)
    values.ravel()[:256] = np.arange(256)
    pool = ImagePool(40, (3, 4, 6), 32, CPU)
    pool.add(torch.from_numpy(values).float() / 255, torch.arange(32))
    images, targets, _ = pool.sample(32)
    np.testing.assert_array_equal((images * 255).round().byte().numpy(), values[targets])
    again = ImagePool(40, (3, 4, 6), 32, CPU)
    again.add(images, targets)
    assert torch.equal(again.images[:32], torch.from_numpy(values)[targets])


def test_images_are_rounded_to_the_nearest_byte_and_clamped():
    pool = ImagePool(5, (1, 1, 1), 1, CPU)
    values = torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.7])
    pool.add(values.view(5, 1, 1, 1), torch.zeros(5).long())
    assert pool.images.flatten().tolist() == [0, 0, 1, 255, 255]


def test_half_precision_images_lose_no_more_than_their_own_precision():
    images = torch.rand(50, 1, 2, 2)
    pool = ImagePool(50, (1, 2, 2), 50, CPU)
    pool.add(images.bfloat16(), torch.arange(50))
    assert torch.equal(pool.images, images.bfloat16().float().mul(255).round().byte())


def test_images_of_another_shape_are_refused():
    pool = ImagePool(5, (3, 2, 2), 4, CPU)
    with pytest.raises(InputError, match=r"\(1, 2, 2\).*\(3, 2, 2\)"):
        pool.add(*numbered(0, 2))


def test_no_gradient_is_kept():
    images = torch.rand(3, 1, 2, 2, requires_grad=True)
    pool = ImagePool(5, (1, 2, 2), 4, CPU)
    pool.add(images * 1, torch.zeros(3).long())
    assert not pool.sample(2).images.requires_grad


@pytest.mark.parametrize("balanced", [False, True])
def test_samples_repeat_only_if_the_pool_is_too_small(balanced):
    pool = filled(20, 17)
    for n in (1, 5, 17):
        images, targets, _ = pool.sample(n, balanced)
        assert images.shape == (n, 1, 2, 2) and len(ids_of(images).unique()) == n
        assert (targets == ids_of(images) % 4).all()
    images, *_ = pool.sample(40, balanced)
    assert len(images) == 40 and len(ids_of(images).unique()) == 17


@pytest.mark.parametrize("balanced", [False, True])
def test_every_image_is_sampled_equally_often(balanced):
    pool = filled(20, 30)  # the ring buffer has wrapped around: images 10 to 29, five of every class
    sampled = torch.cat([ids_of(pool.sample(6, balanced).images) for _ in range(2000)])
    counts = torch.bincount(sampled, minlength=30)[10:]
    assert counts.sum() == 12_000
    # 600 expected, standard deviation below 24.
    assert (counts - 600).abs().max() < 5 * 24


@pytest.mark.parametrize("n", [4, 6, 8, 13])
def test_balanced_samples_have_even_counts(n):
    pool = filled(40, 40)
    for _ in range(20):
        counts = torch.bincount(pool.sample(n, balanced=True).targets, minlength=4)
        assert counts.max() - counts.min() <= (n % 4 > 0) and counts.sum() == n


def test_a_rare_class_is_sampled_as_far_as_it_has_images():
    pool = ImagePool(30, (1, 2, 2), 5, CPU)
    images, _ = numbered(0, 23)
    pool.add(images, torch.tensor([0] * 2 + [1] * 20 + [4]))  # classes 2 and 3 do not occur
    counts = torch.bincount(pool.sample(9, balanced=True).targets, minlength=5)
    assert counts.tolist() == [2, 6, 0, 0, 1]


def test_no_class_is_favoured_by_its_index():
    pool = filled(40, 40)
    odd = torch.cat([pool.sample(1, balanced=True).targets for _ in range(2000)])
    assert (torch.bincount(odd, minlength=4) - 500).abs().max() < 5 * 20


@pytest.mark.parametrize("count", [0, 4, 10, 23])
def test_state_is_restored(count):
    pool, other = filled(10, count), ImagePool(10, (1, 2, 2), 4, CPU)
    state = pool.state_dict()
    other.load_state_dict(state)
    assert len(state["images"]) == min(count, 10)
    assert len(other) == len(pool) and other.added == count
    for p in (pool, other):
        p.add(*numbered(count, 3))
    assert held(other) == held(pool)
    torch.manual_seed(5)
    images, targets, _ = pool.sample(2)
    torch.manual_seed(5)
    again = other.sample(2)
    assert torch.equal(images, again.images) and torch.equal(targets, again.targets)


def test_a_saved_state_does_not_change_with_the_pool():
    pool = filled(10, 10)
    state = pool.state_dict()
    pool.add(*numbered(100, 10))
    assert ids_of(state["images"].float() / 255).tolist() == list(range(10))


@pytest.mark.parametrize("saved, count, capacity", [(10, 23, 20), (20, 23, 10), (20, 15, 10)])
def test_a_state_that_does_not_fit_is_refused(saved, count, capacity):
    state = filled(saved, count).state_dict()
    with pytest.raises(InputError, match="--pool_size"):
        ImagePool(capacity, (1, 2, 2), 4, CPU).load_state_dict(state)


def test_a_pool_that_has_not_wrapped_around_may_grow():
    pool = ImagePool(30, (1, 2, 2), 4, CPU)
    pool.load_state_dict(filled(10, 10).state_dict())
    pool.add(*numbered(10, 5))
    assert held(pool) == list(range(15))


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    "count, capacity, expected", [(7, 30, 7), (10, 30, 10), (23, 30, 0), (7, 5, 0), (5, 5, 5), (0, 4, 0)]
)
def test_a_pool_of_another_size_holds_what_it_held(start, count, capacity, expected):
    pool = ImagePool(10, (1, 2, 2), 4, CPU)
    pool.begin_with(start, lambda: (numbered(200, start)[0].mul(255).byte(), numbered(200, start)[1]))
    for first in range(0, count, 3):
        pool.add(*numbered(first, min(3, count - first)))
    pool.resize(capacity)
    assert pool.capacity == start + capacity and len(held(pool)) == start + expected
    pool.add(*numbered(count, 1))
    oldest = max(count - expected, count + 1 - capacity)
    assert held(pool) == [*range(oldest, count + 1), *range(200, 200 + start)]


def test_nothing_is_shared_with_another_pool():
    one, other = filled(10, 10), ImagePool(10, (1, 2, 2), 4, CPU)
    other.load_state_dict(one.state_dict())
    one.add(*numbered(50, 10))
    assert held(other) == list(range(10)) and len(ImagePool(10, (1, 2, 2), 4, CPU)) == 0


@pytest.mark.parametrize(
    "count, n, expected",
    [(4, 3, [1, 2, 3]), (4, 9, [0, 1, 2, 3]), (23, 5, [18, 19, 20, 21, 22]), (23, 10, list(range(13, 23)))],
)
def test_newest_are_the_last_ones_in_order(count, n, expected):
    images, targets = filled(10, count).newest(n)
    assert ids_of(images).tolist() == expected and targets.tolist() == [i % 4 for i in expected]


def test_a_pool_that_exceeds_the_memory_is_refused_before_it_fills():
    with pytest.raises(InputError, match=r"1,000,000,000 images of \(3, 224, 224\) takes 150528.0 GB .*--pool_size"):
        ImagePool(10**9, (3, 224, 224), 10, CPU)


def test_a_pool_for_which_the_system_refuses_memory_is_refused(monkeypatch):
    monkeypatch.setattr("datafree.pool.free_memory", lambda device: 10**18)  # as under a limit of addresses
    with pytest.raises(InputError, match=r"^out of memory during allocation of the image pool; lower --pool_size"):
        ImagePool(10**12, (3, 224, 224), 10, CPU)


# ---------------------------------------------------------------- passes


def test_a_pass_has_every_image_once_in_an_order_of_its_own():
    pool = filled(100, 20)
    passes = [torch.cat([pool.sample(5, passes=True).ids for _ in range(4)]).tolist() for _ in range(3)]
    assert all(sorted(ids) == list(range(20)) for ids in passes)
    assert len({tuple(ids) for ids in passes}) == 3


def test_a_batch_may_span_passes():
    pool = filled(100, 7)
    ids = torch.cat([pool.sample(5, passes=True).ids for _ in range(7)])
    assert ids.bincount().tolist() == [5] * 7
    whole = pool.sample(20, passes=True)
    assert len(whole.images) == len(whole.targets) == 20 and whole.ids.bincount(minlength=7).min() >= 2


def test_images_that_are_added_start_a_new_pass():
    pool = filled(100, 8)
    pool.sample(6, passes=True)
    pool.add(torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long))
    assert sorted(pool.sample(12, passes=True).ids.tolist()) == list(range(12))


def test_a_pass_is_continued_after_a_restart():
    pool, other = filled(100, 12), filled(100, 12)
    first = pool.sample(5, passes=True).ids.tolist()
    other.load_state_dict(pool.state_dict())
    assert sorted(first + other.sample(7, passes=True).ids.tolist()) == list(range(12))
