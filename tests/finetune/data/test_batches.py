"""Batches: positions, order, and training batches that depend on the seed and the step alone."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ueo_fast.finetune.data.decode import UnreadableImageError
from ueo_fast.finetune.data.image_list import read_images
from ueo_fast.finetune.data.loader import (
    LoadingError,
    LoadingMeter,
    Tolerant,
    data_loader,
    even_loader,
    loading_errors,
    mixed_seed,
    seeded,
    started_workers,
    steps_per_epoch,
    tolerant_loader,
    training_batches,
)
from ueo_fast.finetune.data.transforms import training_transform
from ueo_fast.finetune.data.views import ImageDataset


def numbered(count: int) -> Tensor:
    """Images whose pixels are their position."""
    return torch.arange(float(count))[:, None, None, None].expand(count, 3, 2, 2)


class Noisy(Dataset[Tensor]):
    """Draws from all three global generators; the first pixel is the position."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        drawn = [float(index), float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002
        return torch.tensor(drawn, dtype=torch.float64)


class Broken(Dataset[Tensor]):
    """Some images cannot be read."""

    def __init__(self, count: int, broken: Sequence[int]) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index in self.broken:
            raise UnreadableImageError(f"{index}.jpg", "is broken")
        return torch.full((3, 2, 2), float(index))


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(9, 8, [5, 4]), (5, 2, [3, 2])])
def test_even_batches_have_no_single_image(count: int, batch_size: int, sizes: list[int]) -> None:
    batches = list(even_loader(numbered(count), batch_size, seed=0))
    assert [len(index) for _, index in batches] == sizes
    assert torch.cat([index for _, index in batches]).sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("tensor", [True, False])
def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(tensor: bool) -> None:
    images = numbered(10)
    batches = list(
        training_batches(images if tensor else TensorDataset(images), 4, seed=3, epochs=3)
    )
    assert [batch.epoch for batch in batches] == [1] * 3 + [2] * 3 + [3] * 3
    assert [len(batch.images) for batch in batches] == [4, 4, 2] * 3
    orders = []
    for epoch in (1, 2, 3):
        positions = torch.cat([batch.positions for batch in batches if batch.epoch == epoch])
        assert positions.dtype == torch.int64
        assert positions.sort().values.tolist() == list(range(10))
        orders.append(tuple(positions.tolist()))
    assert len({tuple(range(10)), *orders}) == 4
    for batch in batches:
        assert torch.equal(batch.images, images[batch.positions])


def test_a_tensor_and_a_dataset_come_in_the_same_order() -> None:
    images = numbered(7)
    pairs = zip(
        training_batches(images, 3, seed=1, epochs=2),
        training_batches(TensorDataset(images), 3, seed=1, epochs=2),
        strict=True,
    )
    for tensor, dataset in pairs:
        assert tensor.epoch == dataset.epoch
        assert torch.equal(tensor.images, dataset.images)
        assert torch.equal(tensor.positions, dataset.positions)


def assert_same(found: list, wanted: list) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.epoch == other.epoch
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start_step", range(10))
def test_a_batch_depends_on_the_seed_and_the_step_alone(start_step: int, num_workers: int) -> None:
    whole = list(training_batches(Noisy(), 4, seed=7, epochs=3))
    torch.manual_seed(start_step)  # the state of the global generators plays no part
    random.seed(start_step)
    resumed = training_batches(
        Noisy(), 4, seed=7, epochs=3, start_step=start_step, num_workers=num_workers
    )
    assert_same(list(resumed), whole[start_step:])


def test_augmentation_differs_between_epochs_images_and_seeds() -> None:
    def drawn(seed: int) -> set[tuple[float, ...]]:
        batches = training_batches(Noisy(), 4, seed=seed, epochs=2)
        return {tuple(row[1:].tolist()) for batch in batches for row in batch.images}

    first, second = drawn(0), drawn(1)
    assert len(first) == len(second) == 20
    assert not first & second
    for column in range(3):
        assert len({row[column] for row in first}) == 20


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    def by_position(batch_size: int) -> dict[tuple[int, int], list[float]]:
        return {
            (batch.epoch, position): row.tolist()
            for batch in training_batches(Noisy(), batch_size, seed=2, epochs=2)
            for position, row in zip(batch.positions.tolist(), batch.images, strict=True)
        }

    assert by_position(3) == by_position(10)


def test_real_augmentation_of_files_is_the_same_with_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    dataset = ImageDataset(read_images(tmp_path), training_transform({"size": 32}))
    alone = list(training_batches(dataset, 4, seed=0, epochs=2))
    assert_same(list(training_batches(dataset, 4, seed=0, epochs=2, num_workers=2)), alone)
    assert_same(
        list(training_batches(dataset, 4, seed=0, epochs=2, start_step=3, num_workers=1)), alone[3:]
    )
    assert not torch.equal(alone[0].images, alone[2].images)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_generators_are_left_alone(num_workers: int) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    wanted = float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    list(training_batches(Noisy(), 4, seed=0, epochs=1, num_workers=num_workers))
    list(tolerant_loader(TensorDataset(numbered(3)), 2, num_workers=num_workers))
    found = float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002
    assert found == wanted


def test_generators_are_put_back_after_an_error() -> None:
    before = torch.random.get_rng_state()
    with contextlib.suppress(KeyError), seeded(1, 2):
        assert not torch.equal(torch.random.get_rng_state(), before)
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_are_mixed() -> None:
    numbers = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    seeds = {mixed_seed(*each) for each in numbers}
    assert len(seeds) == 64
    # A change of the formula would change every run: this is NumPy's SeedSequence, which is fixed.
    assert mixed_seed(1, 2, 3) == int(np.random.SeedSequence([1, 2, 3]).generate_state(1, "u8")[0])


def test_a_subset_keeps_positions_of_the_whole() -> None:
    subset = torch.tensor([8, 1, 5, 2, 9])
    for images in (numbered(10), TensorDataset(numbered(10))):
        batches = list(training_batches(images, 2, seed=0, epochs=2, subset=subset))
        assert [len(batch.positions) for batch in batches] == [2, 2, 1] * 2
        for batch in batches:
            assert torch.equal(batch.images[:, 0, 0, 0], batch.positions.float())
        for part in (batches[:3], batches[3:]):
            seen = torch.cat([batch.positions for batch in part])
            assert seen.sort().values.tolist() == [1, 2, 5, 8, 9]


def test_the_images_own_order_can_be_kept() -> None:
    subset = torch.tensor([8, 1, 5])
    for images in (numbered(10), TensorDataset(numbered(10))):
        batches = training_batches(images, 2, seed=0, epochs=2, subset=subset, shuffle=False)
        assert [batch.positions.tolist() for batch in batches] == [[8, 1], [5]] * 2


def test_workers_end_when_the_training_ends_early() -> None:
    batches = training_batches(Noisy(), 2, seed=0, epochs=9, num_workers=2)
    before = set(multiprocessing.active_children())
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    assert isinstance(batches, Generator)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


def test_a_run_that_is_done_has_no_more_batches() -> None:
    assert list(training_batches(numbered(4), 2, seed=0, epochs=2, start_step=4)) == []
    assert list(training_batches(Noisy(), 5, seed=0, epochs=2, start_step=9)) == []


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"), [(10, 4, 3), (8, 4, 2), (1, 4, 1), (4, 1, 4)]
)
def test_steps_per_epoch(count: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(count, batch_size) == steps
    assert len(list(training_batches(numbered(count), batch_size, seed=0, epochs=1))) == steps


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_broke_stops_the_training(num_workers: int) -> None:
    batches = training_batches(Broken(6, [4]), 2, seed=0, epochs=1, num_workers=num_workers)
    with pytest.raises(
        UnreadableImageError, match=r"^4\.jpg: is broken\. It was readable"
    ) as raised:
        list(batches)
    assert raised.value.path == "4.jpg"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        (
            {"subset": torch.tensor([0, 5])},
            "subset has positions from 0 to 5, but images has 5 images",
        ),
        ({"subset": torch.tensor([-1, 2])}, "subset has positions from -1 to 2"),
        ({"subset": torch.tensor([], dtype=torch.int64)}, "subset is empty"),
        ({"images": numbered(0)}, "images is empty"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict, message: str) -> None:
    values = {"images": numbered(5), "batch_size": 2, "seed": 0, "epochs": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        training_batches(values.pop("images"), values.pop("batch_size"), **values)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_told_and_skipped(num_workers: int) -> None:
    batches = list(tolerant_loader(Broken(7, [0, 4, 5]), 2, num_workers=num_workers))
    assert [batch.positions.tolist() for batch in batches] == [[1], [2, 3], [], [6]]
    assert [[row for row, _ in batch.failures] for batch in batches] == [[0], [], [4, 5], []]
    assert batches[2].images is None
    assert str(batches[2].failures[1][1]) == "5.jpg: is broken"
    for batch in batches:
        if batch.images is not None:
            assert torch.equal(batch.images[:, 0, 0, 0], batch.positions.float())


def test_other_errors_are_not_swallowed() -> None:
    class Wrong(Broken):
        def __getitem__(self, index: int) -> Tensor:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(tolerant_loader(Wrong(2, []), 2))


class Fatal(Broken):
    """The system ends the process that loads the image, or gives it no memory."""

    def __getitem__(self, index: int) -> Tensor:
        if index in self.broken:
            if torch.utils.data.get_worker_info() is None or index % 2:
                raise MemoryError
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index + 100)


@pytest.mark.parametrize(
    ("broken", "num_workers", "said"),
    [
        (4, 2, r"was killed, most likely for lack of memory: DataLoader worker \(pid"),
        (5, 2, "no memory is left"),
        (4, 0, "no memory is left"),
    ],
)
def test_a_lack_of_memory_says_how_to_go_on(broken: int, num_workers: int, said: str) -> None:
    images = Fatal(8, [broken])
    way_out = rf"{said}.*Use fewer processes \(--workers 1, or 0; in Python num_workers\)"
    with pytest.raises(LoadingError, match=way_out), loading_errors():
        list(tolerant_loader(images, 2, num_workers=num_workers))
    with pytest.raises(LoadingError, match=way_out), loading_errors():
        list(training_batches(images, 2, seed=0, epochs=1, num_workers=num_workers))
    with pytest.raises(LoadingError, match=way_out), loading_errors():
        list(even_loader(images, 2, seed=0, num_workers=num_workers))


def test_workers_of_a_loader_that_only_the_garbage_collector_finds_end_at_once() -> None:
    loader = tolerant_loader(TensorDataset(numbered(8)), 2, num_workers=2)
    next(loader)
    cycle: list[object] = [loader]
    cycle.append(cycle)
    del loader, cycle
    started = time.monotonic()
    gc.collect()
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 5  # for which PyTorch waits for a worker that hangs


@pytest.mark.parametrize(
    ("message", "translated"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", True),
        ("unable to allocate shared memory(shm) for file </torch_7>", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", True),
        ("Caught RuntimeError in DataLoader worker process 0.", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_only_errors_of_memory_are_translated(message: str, translated: bool) -> None:
    with pytest.raises(LoadingError if translated else RuntimeError) as raised, loading_errors():
        raise RuntimeError(message)
    assert isinstance(raised.value, OSError) == translated


def test_a_tensor_is_loaded_in_order() -> None:
    batches = list(tolerant_loader(numbered(5), 2))
    assert [batch.positions.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([batch.images for batch in batches]), numbered(5))
    with pytest.raises(ValueError, match="images is empty"):
        tolerant_loader(numbered(0), 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tolerant_loader(numbered(5), 0)


def test_a_config_from_elsewhere_does_not_start_more_workers_than_the_machine_can_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # To see the DataLoader itself.
    for name in ("loaded", "_metered"):
        monkeypatch.setattr(f"ueo_fast.finetune.data.loader.{name}", lambda loader: loader)
    affinity = getattr(os, "sched_getaffinity", None)
    most = 4 * (os.cpu_count() or 1 if affinity is None else len(affinity(0)))
    assert [started_workers(count) for count in (0, 1, 10**8)] == [0, 1, most]
    loader = data_loader(Tolerant(Noisy()), iter([]), 10**8, False)
    assert loader.num_workers == most
    assert even_loader(Noisy(), 4, seed=0, num_workers=10**8).num_workers == most


def test_a_meter_says_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that loading and computing move."""
    now = [100.0]
    monkeypatch.setattr("ueo_fast.finetune.data.loader.time.perf_counter", lambda: now[0])

    class Slow(Dataset[torch.Tensor]):
        seconds = 0.3

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> torch.Tensor:
            now[0] += self.seconds
            return torch.zeros(3, 2, 2)

    meter = LoadingMeter()
    assert meter.text() == ""
    images = Slow()
    texts = []
    for _ in tolerant_loader(images, 2):
        now[0] += 0.2
        texts.append((meter.text(), meter.text(rate=False)))
        images.seconds = 0.01
    assert texts[0] == ("2.5 images/s, 75% of the time loading", "75% of the time loading")
    rate, text = texts[-1][0].split(", ")
    assert float(rate.removesuffix(" images/s")) == pytest.approx(2 / 0.22, rel=0.6)
    assert text.endswith("of the time computing")
    assert int(text.split("%")[0]) > 50
