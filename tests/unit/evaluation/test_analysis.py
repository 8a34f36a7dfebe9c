"""What keeps the AP down, on scenes small enough to work it out by hand."""

import pytest

from bigdet.evaluation.scoring import analysis_table, evaluate_detections
from tests.unit.evaluation.cats_and_dogs import CAT, CATEGORIES, DOG, found, truth


@pytest.fixture
def analyze(make_shards):
    def measure(images, results):
        shards = make_shards(images, CATEGORIES)
        return evaluate_detections(shards, results, ("bbox",))["analysis"]["bbox"]

    return measure


def errors_of(numbers):
    counts = {name: count for name, count in numbers["errors"]["count"].items() if count}
    gains = {name: gain for name, gain in numbers["errors"]["dAP"].items() if gain}
    return counts, gains, numbers["errors"]["special"]


def test_everything_right_costs_nothing(analyze):
    numbers = analyze([[truth(CAT), truth(DOG, 1)]], [found(1, CAT, 0.9), found(2, DOG, 0.8)])
    counts, gains, special = errors_of(numbers)
    assert (counts, gains) == ({}, {})
    assert special == pytest.approx({"AP50": 1, "false_positives": 0, "false_negatives": 0})


def test_wrong_class_costs_both_classes(analyze):
    # A dog where the cat is. AP of cat is 0, of dog 1/2: its second detection is the right one.
    # Mended, the dog becomes a cat: both are 1. The cat is not missed, as something is on it.
    numbers = analyze([[truth(CAT), truth(DOG, 1)]], [found(2, CAT, 0.9), found(2, DOG, 0.8)])
    counts, gains, special = errors_of(numbers)
    assert counts == {"classification": 1}
    assert gains == pytest.approx({"classification": 0.75})
    assert special["AP50"] == pytest.approx(0.25)
    assert special["false_positives"] == pytest.approx(0.25)  # the dog alone gains 1/2
    # Not asked for the cat: nothing of its class was detected, so only the dog's 1/2 is left.
    assert special["false_negatives"] == pytest.approx(0.25)


def test_badly_placed_box_is_a_localization_error(analyze):
    # 20x8 of 20x20: IoU 0.4. A second one on the same object vanishes when the first is mended.
    results = [found(1, [0, 0, 20, 8], 0.9), found(1, [0, 0, 20, 6], 0.7), found(2, DOG, 0.8)]
    counts, gains, special = errors_of(analyze([[truth(CAT), truth(DOG, 1)]], results))
    assert counts == {"localization": 2}
    assert special["AP50"] == pytest.approx(0.5)
    assert gains == pytest.approx({"localization": 0.5})


def test_badly_placed_box_of_a_wrong_class_is_both(analyze):
    numbers = analyze(
        [[truth(CAT), truth(DOG, 1)]], [found(2, [0, 0, 20, 8], 0.9), found(2, DOG, 0.8)]
    )
    counts, gains, special = errors_of(numbers)
    assert counts == {"both": 1, "missed": 1}
    # Without it dog rises from 1/2 to 1. Not asked for the cat, only dog's 1/2 is left.
    assert gains == pytest.approx({"both": 0.25, "missed": 0.25})
    assert special["AP50"] == pytest.approx(0.25)


def test_duplicates_and_background(analyze):
    # Right, again, nowhere near, then the dog: cat 1 at once, so the duplicate costs nothing; the
    # dog comes after the background, so that one costs half of its class.
    results = [
        found(1, CAT, 0.9),
        found(1, CAT, 0.8),
        found(2, [80, 0, 10, 10], 0.7),
        found(2, DOG, 0.6),
    ]
    counts, gains, special = errors_of(analyze([[truth(CAT), truth(DOG, 1)]], results))
    assert counts == {"duplicate": 1, "background": 1}
    assert gains == pytest.approx({"background": 0.25})
    assert special["AP50"] == pytest.approx(0.75)


def test_wrong_detections_in_a_crowd_cost_nothing(analyze):
    results = [found(1, [60, 60, 10, 10], 0.9), found(1, CAT, 0.5)]
    images = [[truth(CAT), truth([50, 50, 40, 40], iscrowd=1)]]
    numbers = analyze(images, results)
    assert numbers["errors"]["special"]["AP50"] == pytest.approx(1.0)
    assert numbers["calibration"]["count"] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert numbers["confusion"]["pairs"] == [["cat", "cat", 1]]


def test_calibration_compares_scores_with_what_is_right(analyze):
    # From 0.8: scores 0.85 right and 0.89 wrong; at 1: 1.0 right; from 0.2: 0.25 wrong.
    results = [
        found(1, CAT, 0.85),
        found(2, CAT, 0.89),
        found(2, DOG, 1.0),
        found(2, [0, 60, 9, 9], 0.25),
    ]
    bins = analyze([[truth(CAT), truth(DOG, 1)]], results)["calibration"]
    assert bins["edges"] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert bins["count"] == [0, 0, 1, 0, 0, 0, 0, 0, 2, 1]
    assert bins["score"] == [None, None, 0.25, *[None] * 5, pytest.approx(0.87), 1.0]
    assert bins["precision"] == [None, None, 0.0, *[None] * 5, 0.5, 1.0]
    assert bins["ece"] == pytest.approx((0.25 + 2 * (0.87 - 0.5) + 0) / 4)


def test_scores_that_are_no_probabilities_have_no_calibration(analyze):
    numbers = analyze([[truth(CAT)]], [found(1, CAT, 3.5)])
    assert numbers["calibration"] is None
    assert "calibration" not in analysis_table({"bbox": numbers})


def test_confusion_says_which_class_is_taken_for_which(analyze):
    # The dog is taken for a cat; a cat is seen where nothing is; the second cat is not seen, as
    # 0.2 is below the least score; nor does a cat with a lower score than the dog's take its place.
    images = [[truth(DOG, 1), truth(CAT)], [truth(CAT)]]
    results = [
        found(1, DOG, 0.9),
        found(2, DOG, 0.8),
        found(1, [80, 0, 9, 9], 0.7),
        found(1, CAT, 0.2),
        found(1, CAT, 0.6, image_id=8),
    ]
    confusion = analyze(images, results)["confusion"]
    assert confusion["min_score"] == 0.3
    assert sorted(confusion["pairs"], key=str) == sorted(
        [
            ["cat", "cat", 1],
            ["dog", "cat", 1],
            [None, "dog", 1],
            [None, "cat", 1],
            ["cat", None, 1],
        ],
        key=str,
    )


def test_numbers_by_class_size_and_iou(analyze):
    # IoU 0.8: 7 of 10 thresholds. Both objects are small (400 pixels); nothing finds the dog.
    numbers = analyze([[truth(CAT), truth(DOG, 1)]], [found(1, [0, 0, 20, 16], 0.9)])
    assert numbers["by_iou"]["0.50"] == pytest.approx(0.5)
    assert numbers["by_iou"]["0.80"] == pytest.approx(0.5)
    assert numbers["by_iou"]["0.85"] == 0.0
    assert numbers["by_size"]["small"] == {"objects": 2, "AP": pytest.approx(0.35), "AR": 0.35}
    assert numbers["by_size"]["large"] == {"objects": 0, "AP": None, "AR": None}
    assert numbers["recall"] == {"1": 0.35, "10": 0.35, "100": 0.35}
    cat = {"objects": 1, "detections": 1, "AP": 0.7, "AP50": 1.0, "AP75": 1.0, "AR": 0.7}
    assert numbers["per_class"]["cat"] == pytest.approx(cat)
    assert numbers["per_class"]["dog"]["detections"] == 0


def test_set_without_objects_has_nothing_to_measure(analyze):
    numbers = analyze([[], []], [found(1, CAT, 0.9)])
    assert numbers["errors"]["special"]["AP50"] is None
    assert numbers["errors"]["count"]["background"] == 1
    assert "background" in analysis_table({"bbox": numbers})
