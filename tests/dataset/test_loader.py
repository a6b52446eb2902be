import dataclasses
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset.loader as loader_module
from dataset import Split
from dataset.loader import Loader, epoch_seed
from dataset.splits import holdout_rows, keep_labels
from dataset.views import (
    CIFAR100_NORMALIZATION,
    CLIP_NORMALIZATION,
    CropViews,
    ResizedCropViews,
    crop_flip,
    normalize,
    view_order,
)

CPU = torch.device("cpu")
NUM_VIEWS, TEST_VIEW = 162, 80


@pytest.fixture(scope="module")
def split() -> Split:
    images = np.random.default_rng(0).integers(0, 256, (150, 3, 8, 8), dtype=np.uint8)
    return Split(torch.from_numpy(images), torch.arange(150) % 7)


def train_loader(split: Split, batch_size: int = 64, **options) -> Loader:
    return Loader(split, "train", batch_size, CPU, training=True, **options)


def columns(loader: Loader, epoch: int) -> list[torch.Tensor]:
    """An epoch's index, target, image and teacher_view, over all batches."""
    return [torch.cat(column) for column in zip(*(batch[:4] for batch in loader.epoch(epoch)), strict=True)]


@pytest.mark.parametrize(("batch_size", "sizes"), [(64, [64, 64, 22]), (50, [50] * 3), (200, [150]), (149, [149, 1])])
def test_an_epoch_holds_every_row_once_and_keeps_the_smaller_last_batch(split, batch_size, sizes):
    loader = train_loader(split, batch_size)
    batches = list(loader.epoch(1))
    assert [len(batch.target) for batch in batches] == sizes
    assert (len(loader), loader.num_samples) == (len(sizes), 150)
    index = torch.cat([batch.index for batch in batches])
    assert index.sort().values.tolist() == list(range(150))
    assert index.tolist() != list(range(150))
    assert all(torch.equal(batch.target, split.targets[batch.index]) for batch in batches)


def test_an_images_pixels_are_one_of_its_own_views(split):
    for batch in train_loader(split).epoch(1):
        for row, image in zip(batch.index.tolist(), batch.image, strict=True):
            views = normalize(
                crop_flip(split.images[row].expand(162, -1, -1, -1), torch.arange(162)), CLIP_NORMALIZATION
            )
            assert (views == image).flatten(1).all(1).any()


def test_normalisation_is_the_one_that_was_asked_for(split):
    clips, repdistillers = (
        columns(train_loader(split, normalization=n), 1)[2] for n in (CLIP_NORMALIZATION, CIFAR100_NORMALIZATION)
    )
    (mean, std), (mean2, std2) = (
        torch.tensor(n)[..., None, None] for n in (CLIP_NORMALIZATION, CIFAR100_NORMALIZATION)
    )
    torch.testing.assert_close(clips * std + mean, repdistillers * std2 + mean2, rtol=0, atol=1e-6)


def test_order_and_views_depend_on_seed_and_epoch_alone(split):
    loader = train_loader(split, seed=3)
    first = columns(loader, 5)
    torch.manual_seed(99)
    list(loader.epoch(2))  # neither what ran before nor the global generator matters
    again = columns(train_loader(split, batch_size=17, seed=3), 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    state = torch.get_rng_state()
    list(loader.epoch(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("seed", "epoch"), [(3, 6), (4, 5), (5, 3)])
def test_another_seed_or_epoch_gives_another_order_and_other_views(split, seed, epoch):
    first, other = columns(train_loader(split, seed=3), 5), columns(train_loader(split, seed=seed), epoch)
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[3], other[3])
    by_row = [image[index.argsort()] for index, _, image, _ in (first, other)]
    same = (by_row[0] == by_row[1]).flatten(1).all(1).sum()
    assert same < 10  # about one of 150 gets the same of 162 views twice


def test_neighbouring_seeds_and_epochs_give_unrelated_generator_seeds():
    seeds = {epoch_seed(seed, epoch) for seed in range(40) for epoch in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("options", [{"teacher_views": 1}, {"teacher_views": 16}, {"shared": True}])
def test_the_students_order_and_views_are_the_same_for_every_teacher(split, options):
    with_all, with_other = columns(train_loader(split), 2), columns(train_loader(split, **options), 2)
    assert all(torch.equal(with_all[i], with_other[i]) for i in range(3))


def test_a_shared_view_is_the_students(split):
    batch = next(train_loader(split, shared=True).epoch(1))
    pixels = normalize(crop_flip(split.images[batch.index], batch.teacher_view), CLIP_NORMALIZATION)
    assert torch.equal(batch.image, pixels)
    independent = next(train_loader(split).epoch(1))
    assert not torch.equal(independent.teacher_view, batch.teacher_view)


def chi_square(counts: np.ndarray, expected: float) -> float:
    """How many standard deviations a chi-square statistic lies above its mean."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def blank() -> Split:
    return Split(torch.zeros(20_000, 3, 1, 1, dtype=torch.uint8), torch.zeros(20_000, dtype=torch.long))


@pytest.mark.parametrize("num_views", [1, 2, 16, NUM_VIEWS])
def test_the_teachers_view_is_uniform_among_the_images_first_ones(blank, num_views):
    index, _, _, view = columns(train_loader(blank, 5000, teacher_views=num_views), 1)
    hit = torch.from_numpy(view_order(index.numpy(), num_views)) == view[:, None]
    if num_views < NUM_VIEWS:
        assert hit.any(dim=1).all()
    counts = torch.bincount(view, minlength=NUM_VIEWS) if num_views == NUM_VIEWS else hit.sum(0)
    assert counts.sum() == len(blank)
    if num_views > 1:
        assert abs(chi_square(counts.numpy(), len(blank) / num_views)) < 4


def test_the_teachers_view_is_independent_of_the_students(blank):
    loader = train_loader(blank, teacher_views=NUM_VIEWS)
    # The student's offset decides which of the 81 corners of a padded pixel is seen: read it from the draw.
    _, view, teacher_view = loader._draw(1)
    joint = np.zeros((9, 9))
    np.add.at(joint, (view.numpy() // 18, teacher_view.numpy() // 18), 1)
    assert abs(chi_square(joint, len(blank) / 81)) < 4
    flips = np.zeros((2, 2))
    np.add.at(flips, (view.numpy() % 2, teacher_view.numpy() % 2), 1)
    assert abs(chi_square(flips, len(blank) / 4)) < 4


def test_testing_goes_through_the_rows_in_order_and_shows_the_images_themselves(split):
    loader = Loader(split, "test", 64, CPU)
    index, target, image, teacher_view = columns(loader, 0)
    assert index.tolist() == list(range(150))
    assert torch.equal(target, split.targets)
    assert torch.equal(image, normalize(split.images, CLIP_NORMALIZATION))
    assert (teacher_view == TEST_VIEW).all()
    assert all(torch.equal(a, b) for a, b in zip(columns(loader, 3), [index, target, image, teacher_view], strict=True))


def test_rows_limit_what_is_seen_and_keep_their_numbers_in_the_split(split):
    rows = torch.tensor([3, 149, 70, 8, 9])
    for loader in (train_loader(split, 2, rows=rows, teacher_views=4), Loader(split, "train", 2, CPU, rows=rows)):
        index, target, _, teacher_view = columns(loader, 1)
        assert sorted(index.tolist()) == sorted(rows.tolist())
        assert torch.equal(target, split.targets[index])
        order = view_order(index.numpy(), 4)
        assert all(view in order[i] for i, view in enumerate(teacher_view.numpy()))
    assert index.tolist() == rows.tolist()


def test_max_steps_cuts_an_epoch_short_without_changing_its_start(split):
    loader = train_loader(split, 40, max_steps=2)
    assert (len(loader), loader.num_samples) == (2, 80)
    cut, whole = list(loader.epoch(1)), list(train_loader(split, 40).epoch(1))
    assert len(cut) == 2
    assert all(
        torch.equal(a, b) for x, y in zip(cut, whole[:2], strict=True) for a, b in zip(x[:4], y[:4], strict=True)
    )
    assert len(train_loader(split, 64, max_steps=9)) == 3


def test_without_images_the_rest_is_the_same(split):
    bare, full = train_loader(split, images=False), train_loader(split)
    for a, b in zip(bare.epoch(1), full.epoch(1), strict=True):
        assert a.image is None
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.teacher_view, b.teacher_view)


def test_a_holdout_takes_the_same_fraction_of_every_class():
    targets = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(4), [10, 20, 50, 100])))
    kept, held = holdout_rows(targets, 0.1)
    assert torch.bincount(targets[held]).tolist() == [1, 2, 5, 10]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(180))
    assert torch.equal(held, held.sort().values)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(holdout_rows(targets, 0.1)[1], held)
    torch.set_rng_state(state)
    assert not torch.equal(held, targets.argsort(stable=True)[:18].sort().values)


@pytest.mark.parametrize(("fraction", "counts"), [(0.01, [1, 1, 0, 1]), (0.99, [9, 3, 0, 1])])
def test_a_holdout_leaves_every_class_an_image_and_takes_one_where_there_are_two(fraction, counts):
    targets = torch.arange(4).repeat_interleave(torch.tensor([10, 4, 1, 2]))
    kept, held = holdout_rows(targets, fraction)
    assert torch.bincount(targets[held], minlength=4).tolist() == counts
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(17))


def test_a_holdout_of_classes_of_one_image_each_is_refused():
    with pytest.raises(ValueError, match="no class has two labelled images"):
        holdout_rows(torch.tensor([0, 1, 2, -1, -1]), 0.5)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize(("size", "steps"), [(149, 1), (147, 2), (37, 5), (3, 50), (2, 75), (200, 1)])
def test_no_process_of_batch_norm_has_a_lone_sample(split, size, steps, processes):
    place = [{"rank": rank, "processes": processes, "least": 2} for rank in range(processes)]
    loaders = [train_loader(split, size, **where) for where in place]
    batches = list(zip(*(loader.epoch(1) for loader in loaders), strict=True))
    shares = [[len(part.target) for part in parts] for parts in batches]
    assert {len(loader) for loader in loaders} == {len(batches)} == {steps}
    assert not any(1 in share for share in shares)
    assert all(sum(share) == size for share in shares[:-1])
    assert {loader.last for loader in loaders} == {sum(shares[-1])}
    rows = torch.cat([part.index for parts in batches for part in parts])
    assert torch.equal(rows, torch.cat([batch.index for batch in train_loader(split, size).epoch(1)]))


@pytest.mark.parametrize(("max_steps", "sizes"), [(None, [50, 51]), (2, [50, 50]), (1, [50]), (3, [50, 51])])
def test_a_lone_last_sample_joins_the_batch_before_it_where_that_is_not_cut_off(split, max_steps, sizes):
    rows = {"rows": torch.arange(101), "max_steps": max_steps}
    whole, cut = ([*train_loader(split, 50, **rows, least=least).draws(1)] for least in (2, 1))
    loader = train_loader(split, 50, **rows, least=2)
    assert [draw.numbers.shape[1] for draw in whole] == sizes
    assert (len(loader), loader.num_samples, loader.last) == (len(sizes), sum(sizes), sizes[-1])
    assert torch.equal(whole[0].numbers, cut[0].numbers)
    (resumed,) = [*loader.draws(1, done=len(sizes) - 1)]
    assert torch.equal(resumed.numbers, whole[-1].numbers)
    assert [batch.index.tolist() for batch in train_loader(split, 5, rows=torch.tensor([3]), least=2).epoch(1)] == [[3]]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_processes_share_each_batch_that_one_would_see(split, processes, training, least):
    """150 rows in batches of 37, the last one of 2."""
    options = {"training": training, "seed": 1, "teacher_views": 3, "least": least}
    whole = list(Loader(split, "train", 37, CPU, **options).epoch(2))
    place = [{"rank": rank, "processes": processes} for rank in range(processes)]
    loaders = [Loader(split, "train", 37, CPU, **options, **where) for where in place]
    assert {(len(loader), loader.num_samples) for loader in loaders} == {(5, 150)}
    for batch, *parts in zip(whole, *(loader.epoch(2) for loader in loaders), strict=True):
        columns = zip(*(part[:4] for part in parts), strict=True)
        assert all(torch.equal(torch.cat(column), x) for column, x in zip(columns, batch[:4], strict=True))
        sizes = tuple(len(part.target) for part in parts)
        assert max(sizes) - min(size for size in sizes if size or least == 1) <= 1
        assert sorted(sizes, reverse=True) == list(sizes)
        assert {part.shares for part in parts} == {None if processes == 1 else sizes}
        # A mean over processes of weighted means over shares is the mean over the batch.
        mean = sum(part.weight * part.index.double().mean() for part in parts if len(part.target)) / processes
        assert mean.item() == pytest.approx(batch.index.double().mean().item())


@pytest.mark.parametrize("num_views", [1, 3, 161])
def test_a_shared_view_is_one_of_those_that_the_teacher_has(split, num_views):
    loader = train_loader(split, shared=True, teacher_views=num_views)
    index, view, teacher_view = (torch.cat([draw.numbers[i] for draw in loader.draws(4)]) for i in range(3))
    assert torch.equal(view, teacher_view)
    first = torch.from_numpy(view_order(index.numpy(), num_views))
    assert (first == view[:, None]).any(dim=1).all()
    drawn = [torch.cat([draw.numbers[1] for draw in loader.draws(epoch)]) for epoch in range(1, 4)]
    assert (len(torch.stack(drawn).unique()) == 1) == (num_views == 1)


def test_images_without_a_label_are_not_held_out():
    targets = torch.arange(90) % 3
    targets[30:60] = -1
    kept, held = holdout_rows(targets, 0.25)
    assert torch.bincount(targets[held]).tolist() == [5, 5, 5]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(90))


def test_labels_are_kept_of_the_same_fraction_of_every_class():
    targets = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(-1, 4), [30, 10, 20, 50, 100])))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    few, more = (keep_labels(targets, share, "abcd") for share in (0.1, 0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert [torch.bincount(kept[kept >= 0]).tolist() for kept in (few, more)] == [[1, 2, 5, 10], [5, 10, 25, 50]]
    assert all(torch.equal(kept[kept >= 0], targets[kept >= 0]) for kept in (few, more))
    assert (more[few >= 0] >= 0).all()  # a larger share holds the smaller one
    assert torch.equal(keep_labels(targets, 1, "abcd"), targets)
    assert (keep_labels(targets, 0, "abcd") == -1).all()


def test_a_share_too_small_for_a_class_is_refused():
    with pytest.raises(ValueError, match="leaves class 'ant' no label on any of its 10 images; use 0.1 or more"):
        keep_labels(torch.arange(30) % 3, 0.01, ["ant", "bee", "cat"])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_mean_that_counts_labels_alone_is_that_of_the_whole_batch_over_processes(split, processes):
    """150 rows in batches of 7, the last of 3; a third of them labelled, which leaves shares and batches without."""
    targets = torch.where(torch.arange(150) % 3 == 0, split.targets, -1)
    some = Split(split.images, targets)
    loaders = [train_loader(some, 7, rank=rank, processes=processes) for rank in range(processes)]
    seen = set()
    for parts in zip(*(loader.epoch(2) for loader in loaders), strict=True):
        index, target = (torch.cat([part[i] for part in parts]) for i in range(2))
        assert torch.equal(target, targets[index])
        labelled = index[target >= 0].double()
        mean = 0.0
        for part in parts:
            own = part.index[part.target >= 0].double()
            assert part.labelled.item() == len(own)
            mean += part.weight * (own.sum().item() / max(len(part.index), 1)) / processes
        assert mean == pytest.approx(labelled.sum().item() / len(index))
        seen.add(len(labelled) > 0)
        seen |= {"a share without" for part in parts if not part.labelled}
    assert {True, "a share without"} <= seen or processes == 1
    assert next(train_loader(split, 7).epoch(1)).labelled is None
    labelled_rows = (targets >= 0).nonzero().flatten()
    assert next(train_loader(some, 7, rows=labelled_rows).epoch(1)).labelled is None


@pytest.fixture
def mapped(tmp_path):
    """Squares of 37 pixels that lie in a file, channels last; mapped, or read from it."""
    images = np.random.default_rng(1).integers(0, 256, (60, 37, 37, 3), dtype=np.uint8)
    images.tofile(tmp_path / "images.u8")
    file = np.memmap(tmp_path / "images.u8", dtype=np.uint8, mode="c", shape=images.shape)
    targets = torch.arange(60) % 7
    return (Split(torch.from_numpy(x).permute(0, 3, 1, 2), targets, x is file) for x in (file, images))


@pytest.fixture
def reads(monkeypatch) -> list[torch.Tensor]:
    """The row numbers of each batch that is read."""
    found, read = [], loader_module.read

    def reading(images, index, device):
        found.append(index)
        return read(images, index, device)

    monkeypatch.setattr(loader_module, "read", reading)
    return found


def reader_threads() -> int:
    return sum("ThreadPool" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("views", [CropViews(37), ResizedCropViews(32)])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_read_ahead_from_a_file_is_the_same(mapped, views, training):
    options = {"training": training, "views": views, "rows": torch.arange(3, 60)}
    ahead, plain = (Loader(split, "train", 8, CPU, **options) for split in mapped)
    assert (ahead.reads_ahead, plain.reads_ahead) == (True, False)
    for a, b in zip(ahead.epoch(1), plain.epoch(1), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        assert a.image.shape[1:] == (3, views.size, views.size)
        assert reader_threads() == 1
    assert (ahead.waited > 0, plain.waited) == (True, 0)
    next(ahead.epoch(1))
    assert reader_threads() == 0  # nor does one remain where an epoch is left


def test_planar_images_are_read_ahead_too(split):
    file = dataclasses.replace(split, mapped=True)
    for a, b in zip(train_loader(file).epoch(1), train_loader(split).epoch(1), strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.target, b.target)


def test_an_epoch_can_begin_inside_and_reads_nothing_before(mapped, reads):
    file, memory = mapped
    whole = list(train_loader(file, 8, views=CropViews(37)).draws(2))
    assert len(reads) == 8
    for split in (file, memory):
        reads.clear()
        rest = list(train_loader(split, 8, views=CropViews(37)).draws(2, done=5))
        assert len(rest) == 3
        assert all(torch.equal(a.numbers, b.numbers) for a, b in zip(rest, whole[5:], strict=True))
        assert len(reads) == (3 if split is file else 0)
    assert all(torch.equal(a.stored, memory.images[a.numbers[0]]) for a in whole)


def test_each_process_reads_its_own_share_only(mapped, reads):
    file = next(mapped)
    for rank in range(2):
        list(train_loader(file, 7, views=CropViews(37), rank=rank, processes=2).draws(1))
    assert torch.cat(reads).sort().values.tolist() == list(range(60))


def test_no_more_is_read_ahead_than_two_batches(mapped, reads):
    for number, _ in enumerate(train_loader(next(mapped), 8).draws(1), start=1):
        assert number <= len(reads) <= min(number + 2, 8)


def test_what_goes_wrong_in_the_thread_is_an_error_of_the_epoch(mapped, monkeypatch):
    def fails(images, index, device):
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader_module, "read", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        next(train_loader(next(mapped), 8).epoch(1))


def own_memory() -> int:
    """Bytes of this process that are not pages of a file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_reading_a_large_file_takes_no_memory_of_ones_own(tmp_path):
    with open(tmp_path / "images.u8", "wb") as file:
        file.truncate(1024 * 256 * 256 * 3)  # a hole of 192 MiB
    images = np.memmap(tmp_path / "images.u8", dtype=np.uint8, mode="c", shape=(1024, 256, 256, 3))
    split = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.zeros(1024).long(), mapped=True)
    before = own_memory()
    batches = train_loader(split, 16, views=ResizedCropViews(224)).epoch(1)
    assert max(own_memory() for _ in batches) - before < 96 * 2**20


def test_photographs_views_are_drawn_without_end_but_for_the_teachers_first(blank):
    views = ResizedCropViews(1)
    drawing = train_loader(blank, 5000, views=views, teacher_views=4)
    view, teacher_view = (torch.cat([draw.numbers[i] for draw in drawing.draws(1)]) for i in (1, 2))
    assert len(view.unique()) > 19_990
    assert view.min() > 0
    assert abs(chi_square(torch.bincount(teacher_view, minlength=4).numpy(), 5000)) < 4
    any_view = torch.cat([draw.numbers[2] for draw in train_loader(blank, 5000, views=views).draws(1)])
    assert len(any_view.unique()) > 19_990
    shared = train_loader(blank, 5000, views=views, teacher_views=4, shared=True)
    assert all(torch.equal(draw.numbers[1], draw.numbers[2]) for draw in shared.draws(1))
    assert (Loader(blank, "test", 5000, CPU, views=views)._draw(0)[1] == 0).all()
