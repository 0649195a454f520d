"""The benchmarks' own sums: medians and spread, what counts as worse, and what the reports say."""

import re
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import harness, report
from benchmarks.goals import GOALS, Goal
from benchmarks.harness import Baseline, Figure, Plan, Results, Table, median_of, ratio_of

FAST = Goal("how slow it is", 1.0, portable=True)
STRONG = Goal("how strong it is", 0.9, at_least=True, portable=True)
LOCAL = Goal("how long it takes here", 50)


def steady(value: float, unit: str = "ratio") -> Figure:
    return Figure(value, unit, [value] * 5)


class TestFigures:
    def test_a_ratio_is_that_of_the_medians_and_keeps_each_turn(self) -> None:
        figure = ratio_of([2.0, 4.0, 60.0], [1.0, 2.0, 3.0], "ms", 1000)
        assert figure.value == 2.0
        assert figure.runs == [2.0, 2.0, 20.0]
        assert figure.detail == "4e+03 ms against 2e+03 ms"

    def test_turns_of_one_side_only_are_refused(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            ratio_of([1.0, 2.0], [1.0], "s")

    def test_one_wild_run_does_not_change_a_median(self) -> None:
        assert median_of([1.0, 1.1, 0.9, 100.0, 1.0], "s").value == 1.0

    def test_spread_is_half_the_middle_half_as_a_share(self) -> None:
        assert Figure(10.0, "s", [8.0, 9.0, 10.0, 11.0, 12.0]).spread == pytest.approx(0.1)

    @pytest.mark.parametrize("figure", [Figure(5.0, "s", []), Figure(5.0, "s", [5.0]), Figure(0.0, "%", [0.0, 0.0])])
    def test_too_few_runs_or_nothing_at_all_have_no_spread(self, figure: Figure) -> None:
        assert figure.spread == 0.0


class TestGoals:
    @pytest.mark.parametrize(
        ("goal", "value", "met"),
        [
            (FAST, 1.0, True),
            (FAST, 1.01, False),
            (STRONG, 0.9, True),
            (STRONG, 0.89, False),
            (Goal("shown"), 9e9, True),
        ],
    )
    def test_limits_are_part_of_what_is_allowed(self, goal: Goal, value: float, met: bool) -> None:
        assert goal.met(value) is met

    def test_every_figure_that_is_taken_has_a_goal_or_is_a_table(self) -> None:
        taken = {key for group in bench.GROUPS for key in group.keys}
        assert taken - {"snapshot_sizes"} == set(GOALS)

    def test_times_are_never_compared_with_other_machines(self) -> None:
        assert not [key for key, goal in GOALS.items() if goal.portable and key.endswith(("_s", "_ms"))]


class TestTurns:
    def test_as_many_as_wanted(self) -> None:
        assert list(Plan().turns(5, 60)) == [0, 1, 2, 3, 4]

    def test_few_when_quick(self) -> None:
        assert len(list(Plan(quick=True).turns(20, 60))) == 5

    def test_no_more_than_needed_once_the_time_is_over(self) -> None:
        assert len(list(Plan().turns(50, 0.0, least=3))) == 3

    def test_what_takes_too_long_is_stopped(self) -> None:
        with pytest.raises(TimeoutError, match="not done within"), harness.time_limit(0.05):
            time.sleep(5)

    def test_and_the_limit_ends_with_it(self) -> None:
        with harness.time_limit(0.02):
            pass
        time.sleep(0.05)


class TestBaseline:
    goals = {"fast": FAST, "strong": STRONG, "local": LOCAL}

    def worse(self, before: dict[str, Baseline], **figures: Figure) -> list[str]:
        return harness.worse(Results(figures=figures), before, self.goals)

    def test_worse_by_more_than_the_spread_is_named(self) -> None:
        (line,) = self.worse({"fast": Baseline(1.0, 0.1)}, fast=steady(1.2))
        assert line == "fast: 1.2 was 1 (+20%, allowed 10%)"

    def test_worse_within_the_spread_is_not(self) -> None:
        assert self.worse({"fast": Baseline(1.0, 0.3)}, fast=steady(1.2)) == []

    def test_both_spreads_count(self) -> None:
        wide = Figure(1.2, "ratio", [1.0, 1.1, 1.2, 1.3, 1.4])
        assert self.worse({"fast": Baseline(1.0, 0.12)}, fast=wide) == []

    def test_better_is_never_named(self) -> None:
        assert (
            self.worse({"fast": Baseline(1.0, 0), "strong": Baseline(1.0, 0)}, fast=steady(0.5), strong=steady(2)) == []
        )

    def test_less_is_worse_where_more_is_wanted(self) -> None:
        (line,) = self.worse({"strong": Baseline(1.0, 0.0)}, strong=steady(0.8))
        assert line.startswith("strong: 0.8 was 1 (-20%")

    def test_a_figure_that_could_not_be_taken_any_more_is_named(self) -> None:
        results = Results(failures={"fast": "BootError: it did not boot"})
        (line,) = harness.worse(results, {"fast": Baseline(1.0, 0.1)}, self.goals)
        assert "could not be taken (BootError" in line

    def test_a_figure_that_was_not_asked_for_is_not(self) -> None:
        assert self.worse({"fast": Baseline(1.0, 0.1)}) == []

    def test_small_percentages_may_move_while_their_goal_is_met(self) -> None:
        goals = {"idle": Goal("idle", 2, portable=True)}
        before = {"idle": Baseline(0.2, 0.0)}
        assert harness.worse(Results(figures={"idle": steady(0.9, "%")}), before, goals) == []
        assert len(harness.worse(Results(figures={"idle": steady(2.5, "%")}), before, goals)) == 1

    def test_only_what_is_portable_is_kept(self, tmp_path: Path) -> None:
        results = Results(figures={"fast": steady(1.0), "local": steady(40, "ms")}, machine={"cpu": "a fast one"})
        path = tmp_path / "baseline.json"
        assert harness.read_baseline(path) == {}
        path.write_text(harness.to_baseline(results, self.goals))
        assert harness.read_baseline(path) == {"fast": Baseline(1.0, 0.0)}


@pytest.fixture
def results() -> Results:
    return Results(
        figures={
            "fast": Figure(1.5, "ratio", [1.4, 1.5, 1.6], "1.5 s against 1 s"),
            "strong": Figure(0.95, "ratio", [0.95], "<b>detail</b>"),
        },
        failures={"local": "BootError: <guest> did not boot"},
        tables={"sizes": Table("By size", ["MB", "s"], [[1, 0.05], [500, 0.9]])},
        machine={"cpu": "a fast one", "cores": 2, "accelerator": "tcg", "accelerator_reason": "no vmx"},
    )


class TestReports:
    goals = {"fast": FAST, "strong": STRONG, "local": LOCAL}

    def test_json_comes_back_as_it_was(self, results: Results) -> None:
        assert harness.from_json(harness.to_json(results)) == results

    def test_text_says_what_is_met_what_falls_short_and_what_failed(self, results: Results) -> None:
        lines = report.as_text(results, self.goals).splitlines()
        assert re.match(r"fast +≤ 1 +1\.5 ratio +±3% +short of goal +1\.5 s against 1 s", lines[1])
        assert re.match(r"strong +≥ 0\.9 +0\.95 ratio +±0% +met", lines[2])
        assert re.match(r"local +≤ 50 +NOT MEASURED +BootError", lines[3])

    def test_text_names_the_machine_and_the_accelerator(self, results: Results) -> None:
        text = report.as_text(results, self.goals)
        assert "a fast one" in text
        assert "under TCG: no vmx" in text

    def test_the_page_needs_nothing_beside_itself_and_escapes(self, results: Results) -> None:
        page = report.as_html(results, {"fast": Baseline(1.2, 0.1)}, ["fast: 1.5 was 1.2"], self.goals)
        assert "<script" not in page
        assert not re.search(r"(src|href)=", page)
        assert "&lt;guest&gt; did not boot" in page
        assert "<b>detail</b>" not in page
        assert page.count("<svg") == 2
        assert page.count("<circle") == 4
        assert "short of goal" in page
        assert "fast: 1.5 was 1.2" in page

    def test_charts_have_room_for_the_goal_and_the_baseline(self, results: Results) -> None:
        page = report.as_html(results, {"fast": Baseline(30.0, 0.1)}, goals=self.goals)
        positions = [float(at) for at in re.findall(r"(?:cx|x1)='([\d.]+)'", page)]
        assert all(0 <= at <= report.WIDTH for at in positions)


class TestRuns:
    def test_a_figure_that_fails_does_not_stop_the_others(self) -> None:
        def broken(plan: Plan, kernels: object):  # type: ignore[no-untyped-def]
            yield "first", Figure(1.0, "ratio")
            raise RuntimeError("the guest is gone")

        def good(plan: Plan, kernels: object):  # type: ignore[no-untyped-def]
            yield "third", Figure(3.0, "ratio")

        groups = (
            bench.Group(("first", "second"), broken, 10, machines=False),
            bench.Group(("third",), good, 10, machines=False),
        )
        found = bench.take(groups, Plan(), lambda text: None)
        assert set(found.figures) == {"first", "third"}
        assert found.failures == {"second": "RuntimeError: the guest is gone"}

    def test_a_figure_that_takes_too_long_is_given_up(self) -> None:
        def slow(plan: Plan, kernels: object):  # type: ignore[no-untyped-def]
            time.sleep(5)
            yield "first", Figure(1.0, "ratio")

        found = bench.take((bench.Group(("first",), slow, 0.1, machines=False),), Plan(), lambda text: None)
        assert found.failures["first"].startswith("TimeoutError: not done within")

    def test_figures_are_chosen_by_key(self) -> None:
        assert [group.keys[0] for group in bench.chosen("fork10_s, cell_ratio")] == ["cell_ratio", "fork10_s"]
        assert bench.chosen("") == bench.GROUPS

    def test_an_unknown_key_is_refused(self) -> None:
        with pytest.raises(SystemExit, match="no figure speed"):
            bench.chosen("speed")
