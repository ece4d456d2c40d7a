"""A budget for INT8: what can be one, and the cost of the chosen trial in words and for the manifest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from darktrt.check.budget import EvaluationData, Trade, Trial, check_budget
from darktrt.check.coco import Accuracy
from darktrt.engine.manifest import Int8Cost
from darktrt.errors import DarktrtError


@pytest.mark.parametrize("budget", [0, 0.0, 1e-9, 0.005, 1, 7.5])
def test_a_budget_is_nothing_or_more(budget: float) -> None:
    check_budget(budget)


@pytest.mark.parametrize("budget", [-1e-9, -1, math.nan, math.inf, -math.inf])
def test_what_is_no_budget_is_refused(budget: float) -> None:
    with pytest.raises(DarktrtError, match=rf"the largest drop is {budget:g}; it must be 0 or more, such as 0\.005 for half a"):
        check_budget(budget)


@pytest.mark.parametrize(("limit", "possible"), [(None, True), (1, True), (16, True), (0, False), (-1, False)])
def test_the_sample_of_an_evaluation_has_an_image(limit: Any, possible: bool) -> None:
    if possible:
        assert EvaluationData(["photos"], limit).seed == 0
    else:
        with pytest.raises(DarktrtError, match=f"the limit is {limit}; evaluate on at least 1 image"):
            EvaluationData(["photos"], limit)


def test_the_last_trial_is_the_chosen_one() -> None:
    """With labels its cost is a drop of AP, and the AP that is left."""
    exact = Accuracy(0.5, 0.75, 0.5, 0.5, 0.5, 0.5)
    trials = (Trial(("a",), 0.25, exact), Trial(("a", "b", "c"), 0.0123, exact))
    trade = Trade(0.02, trials)
    assert trade.chosen == trials[1]
    assert str(trade) == "3 convolutions stay in FP16, AP drop 0.0123 (at most 0.02)"
    assert trade.cost("val.json") == Int8Cost("AP", 0.0123, 0.02, "val.json", 0.5, 0.75)


def test_without_labels_the_cost_is_a_change_of_scores() -> None:
    trade = Trade(0.01, (Trial((), 0.001),))
    assert str(trade) == "0 convolutions stay in FP16, change of the scores 0.0010 (at most 0.01)"
    assert trade.cost("photos") == Int8Cost("scores", 0.001, 0.01, "photos")
