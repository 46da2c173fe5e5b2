"""UPL: which images become pseudo-labels, and the loss on them."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from tiny_problem import check_gradients, make_classifier, make_images, random_features, random_step

from ueo_fast.finetune.engine.trainer import TrainerConfig
from ueo_fast.finetune.methods import UPL
from ueo_fast.finetune.methods.upl import surest_labels
from ueo_fast.finetune.target import Target, zero_shot_target


def chosen_by_hand(probabilities: list[list[float]], k: int) -> dict[int, int]:
    """The paper's rule, image by image."""
    classes = defaultdict(list)
    for image, row in enumerate(probabilities):
        label = max(range(len(row)), key=lambda c: (row[c], -c))
        classes[label].append((-row[label], image))
    return {image: label for label, found in classes.items() for _, image in sorted(found)[:k]}


PROBABILITIES = [
    [0.7, 0.2, 0.1, 0.0],  # class 0
    [0.4, 0.4, 0.1, 0.1],  # a tie of two classes: the first, 0
    [0.9, 0.1, 0.0, 0.0],  # class 0
    [0.2, 0.6, 0.1, 0.1],  # class 1
    [0.7, 0.1, 0.2, 0.0],  # class 0, as sure as image 0
    [0.1, 0.6, 0.2, 0.1],  # class 1, as sure as image 3
    [0.25, 0.25, 0.25, 0.25],  # class 0, the least sure
    [0.0, 0.0, 0.45, 0.55],  # class 3; nothing is put into class 2, though 0.45 is its best
]


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [-1, -1, 0, 1, -1, -1, -1, 3]),
        (2, [0, -1, 0, 1, -1, 1, -1, 3]),  # of images 0 and 4, equally sure, the earlier
        (3, [0, -1, 0, 1, 0, 1, -1, 3]),
        (4, [0, 0, 0, 1, 0, 1, -1, 3]),
        (16, [0, 0, 0, 1, 0, 1, 0, 3]),
    ],
)
def test_selection_on_a_hand_made_example(k, expected):
    assert surest_labels(*torch.tensor(PROBABILITIES).max(dim=1), k).tolist() == expected
    by_hand = chosen_by_hand(PROBABILITIES, k)
    assert expected == [by_hand.get(image, -1) for image in range(8)]


@pytest.mark.parametrize(("images", "classes", "k"), [(60, 7, 4), (200, 3, 16), (5, 40, 2)])
def test_selection_on_random_probabilities(images, classes, k):
    p = random_features(images, seed=images, features=classes).softmax(dim=1)
    by_hand = chosen_by_hand(p.tolist(), k)
    found = surest_labels(*p.max(dim=1), k)
    assert found.tolist() == [by_hand.get(image, -1) for image in range(images)]


def test_which_image_is_surer_is_said_at_the_model_s_own_temperature():
    classifier = make_classifier("vit")
    cosines = torch.tensor([[0.6, 0.1, 0.5], [0.6, 0.4, 0.4]])
    plain = cosines.softmax(dim=1)[:, 0]
    own = (classifier.logit_scale * cosines).softmax(dim=1)[:, 0]
    assert plain[0] > plain[1]
    assert own[0] < own[1]
    objective = UPL(k=1).objective(classifier, Target(make_images(2), cosines=cosines))
    assert objective.subset.tolist() == [1]


def test_sure_images_are_told_apart():
    """In float32 both probabilities round to 1, and the first would win."""
    classifier = make_classifier("vit")
    gap = 18 / float(classifier.logit_scale)
    cosines = torch.tensor([[gap, 0.0, 0.0], [gap * 1.2, 0.0, 0.0]])
    assert (classifier.logit_scale * cosines).softmax(dim=1)[:, 0].tolist() == [1.0, 1.0]
    objective = UPL(k=1).objective(classifier, Target(make_images(2), cosines=cosines))
    assert objective.subset.tolist() == [1]


def test_images_are_looked_at_in_parts(monkeypatch):
    """In double the cosines of half a million images would be gigabytes."""
    whole = objective_of(PROBABILITIES).labels.tolist()
    monkeypatch.setattr("ueo_fast.finetune.methods.upl._ROWS", 3)
    assert objective_of(PROBABILITIES).labels.tolist() == whole
    assert whole == [0, -1, 0, 1, -1, 1, -1, 3]


def objective_of(probabilities, k=2):
    classifier = make_classifier("vit")
    cosines = torch.tensor(probabilities).log() / float(classifier.logit_scale)
    target = Target(make_images(len(probabilities)), cosines=cosines)
    return UPL(k).objective(classifier, target)


THREE = [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.9, 0.05, 0.05]]


def test_loss_is_the_cross_entropy_of_the_labels_of_each_image():
    objective = objective_of(THREE, k=1)
    assert objective.subset.tolist() == [2, 3, 4]
    step = random_step(torch.tensor([4, 2, 3]), classes=3)
    expected = 0.0
    for row, label in zip(step.logits.tolist(), [0, 2, 1], strict=True):
        expected -= row[label] - math.log(sum(math.exp(value) for value in row))
    assert float(objective(step)) == pytest.approx(expected / 3, rel=1e-12)
    elsewhere = step._replace(positions=torch.tensor([2, 4, 3]))
    assert objective(elsewhere) != objective(step)


def test_gradients():
    check_gradients(objective_of(THREE), torch.tensor([4, 1, 0, 2]), classes=3)


def test_state_round_trips():
    first, second = objective_of(THREE, k=1), objective_of(THREE[1:] + THREE[:1], k=1)
    step = random_step(torch.tensor([2, 3]), classes=3)
    assert first(step) != second(step)
    second.load_state_dict(first.state_dict())
    assert first(step) == second(step)
    assert torch.equal(first.subset, second.subset)


@pytest.mark.parametrize("k", [0, -3])
def test_k_must_be_positive(k):
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        UPL(k)


def test_only_the_chosen_images_are_trained_on():
    classifier = make_classifier()
    images = make_images(30)
    target = zero_shot_target(classifier, images)
    objective = UPL(k=3).objective(classifier, target)
    assert 3 <= len(objective.subset) <= 9
    seen: list[int] = []
    method = UPL(k=3)
    recorded = _Recorded(images, seen)
    history = method.adapt(
        classifier,
        Target(images, augmented=recorded, cosines=target.cosines),
        config=TrainerConfig(epochs=2, batch_size=2, prompt_lr=0.01, affine_lr=0.01),
    )
    chosen = objective.subset.tolist()
    assert sorted(seen) == sorted(chosen * 2)
    assert len(history) == 2 * math.ceil(len(chosen) / 2)


class _Recorded(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor, seen: list[int]) -> None:
        self.images, self.seen = images, seen

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.seen.append(index)
        return self.images[index]
