"""Policies with one classic mistake each; the laws must catch every one. If a mutant passes, the laws are too weak."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_earlyexit.errors import PolicyError
from hf_earlyexit.policies import POLICIES, BeemPolicy, ConfidencePolicy, PatiencePolicy
from hf_earlyexit.walking import laws
from hf_earlyexit.walking.laws import check_exit_policy

OPEN = {"thresholds": (0.6, 0.7, 0.8)}
mutants: list = []


def mutant(*broken: str, **numbers):
    """The decorated policy breaks each of these laws."""

    def put(cls):
        cls = dataclass(frozen=True, kw_only=True)(cls)
        mutants.extend(pytest.param(cls, {**OPEN, **numbers}, law, id=f"{cls.__name__}-{law}") for law in broken)
        return cls

    return put


@mutant("rows_do_not_see_each_other")
class DecidesForTheWholeBatch(ConfidencePolicy):
    """As released code does: nobody leaves before everybody may."""

    def leaves(self, score, exit_index):
        leave = super().leaves(score, exit_index)
        return leave.all().expand(leave.shape)


@mutant("rows_do_not_see_each_other", thresholds=(1, 1, 2))
class AgreesForTheWholeBatch(PatiencePolicy):
    """PABEE's and BEEM's released code: one row that changes its mind sets everybody back."""

    def update(self, state, signal, exit_index):
        chain, count, answer = super().update(state, signal, exit_index)
        count = count * (count > 0).all()
        return chain._replace(total=count), count, answer


@mutant("rows_do_not_see_each_other", "dropping_rows_changes_nothing", "serving_equals_scan")
class ComparesWithItsMates(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score / score.sum() * len(score) * 0.7, answer


@mutant("same_input_same_output")
class CountsOnItself(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        object.__setattr__(self, "_count", getattr(self, "_count", 0) + 1)
        state, score, answer = super().update(state, signal, exit_index)
        return state, score / self._count, answer


@mutant("inputs_and_policy_stay_untouched")
class CountsInItsFields(ConfidencePolicy):
    calls: int = 0

    def update(self, state, signal, exit_index):
        object.__setattr__(self, "calls", self.calls + 1)
        return super().update(state, signal, exit_index)


@mutant("serving_equals_scan", thresholds=(1, 1, 2))
class RemembersOnItself(PatiencePolicy):
    """State that does not know when rows have left."""

    def init_state(self, batch_size, num_classes, device):
        state = super().init_state(batch_size, num_classes, device)
        object.__setattr__(self, "_chain", state)
        return state

    def update(self, state, signal, exit_index):
        chain, score, answer = super().update(self._chain, signal, exit_index)
        object.__setattr__(self, "_chain", chain)
        return state, score, answer


@mutant("inputs_and_policy_stay_untouched")
class WritesIntoItsSignal(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        signal.logits.sub_(signal.logits.amax(-1, keepdim=True))
        return super().update(state, signal, exit_index)


@mutant("inputs_and_policy_stay_untouched", thresholds=(1, 1, 2))
class WritesIntoItsState(PatiencePolicy):
    """A state that was kept to be replayed is no longer what it was."""

    def update(self, state, signal, exit_index):
        _, score, answer = super().update(state, signal, exit_index)
        state.predicted.copy_(signal.logits.argmax(-1))
        state.started.fill_(True)
        state.total.copy_(score)
        return state, score, answer


@mutant("scores_are_finite_and_not_negative")
class OverflowsInHalfPrecision(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        powers = signal.logits.exp()
        return state, (powers / powers.sum(-1, keepdim=True)).amax(-1).float(), signal.logits


@mutant("scores_are_finite_and_not_negative")
class FallsBelowZero(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score - 0.5, answer


@mutant("score_at_the_threshold_leaves")
class LeavesOnlyAboveTheThreshold(ConfidencePolicy):
    def leaves(self, score, exit_index):
        if exit_index == len(self.thresholds) or self.thresholds[exit_index] is None:
            return super().leaves(score, exit_index)
        return score > self.thresholds[exit_index]


@mutant("higher_thresholds_never_leave_earlier")
class LeavesBelowTheThreshold(ConfidencePolicy):
    """An uncertainty compared as if it were a certainty."""

    def leaves(self, score, exit_index):
        if exit_index == len(self.thresholds) or self.thresholds[exit_index] is None:
            return super().leaves(score, exit_index)
        return score <= self.thresholds[exit_index]


@mutant("last_exit_always_leaves", "a_single_exit_works")
class KeepsRowsAtTheLastExit(ConfidencePolicy):
    def leaves(self, score, exit_index):
        return super().leaves(score, exit_index) & (score >= 0.9)


class Total(NamedTuple):
    """The sum of scores so far, in a shape that does not start with the rows."""

    total: Tensor


@mutant("state_is_tensors_with_rows_first", thresholds=(0.6, 1.2, 1.8))
class KeepsRowsLast(ConfidencePolicy):
    @property
    def highest_threshold(self):
        return 9.0

    def init_state(self, batch_size, num_classes, device):
        return Total(torch.zeros(1, batch_size))

    def update(self, state, signal, exit_index):
        _, score, answer = super().update(state, signal, exit_index)
        total = Total(state.total + score)
        return total, total.total[0], answer


@mutant("json_round_trip_is_exact", calm=0.25)
class LosesAFieldInJson(ConfidencePolicy):
    calm: float = 0.5

    def to_dict(self):
        return {key: value for key, value in super().to_dict().items() if key != "calm"}


@mutant("json_round_trip_is_exact", calm=1 / 3)
class RoundsAFieldInJson(ConfidencePolicy):
    calm: float = 0.5

    def to_dict(self):
        return {**super().to_dict(), "calm": round(self.calm, 6)}


@mutant("order_of_rows_is_free")
class AddsUpOverTheBatch(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score.cumsum(0) / (1 + torch.arange(len(score))), answer


@mutant("shapes_and_dtype_are_right")
class ScoresInHalfPrecision(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score.bfloat16(), answer


@mutant("serving_equals_scan", thresholds=(None, 1, 2))
class HidesThatItNeedsHistory(PatiencePolicy):
    """Closed exits are then skipped in serving and looked at in calibration."""

    uses_history = False


@mutant("empty_batches_and_single_rows_work")
class NeedsARow(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score.clamp_max(score.max() + 1), answer


@mutant("a_single_exit_works")
class NeedsAnEarlyExit(ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score * (self.thresholds[0] or 1) ** 0, answer


@pytest.mark.parametrize(("cls", "numbers", "law"), mutants)
def test_a_mutant_is_caught_by_its_law(monkeypatch, cls, numbers, law):
    POLICIES.names()  # entry points first: what is added below is taken away again
    monkeypatch.setitem(POLICIES._items, "mutant", cls)
    policy = cls(**numbers)
    assert not holds(getattr(laws, law), policy), f"{cls.__name__} keeps '{law}', which should have caught it"
    with pytest.raises(PolicyError, match=f"{cls.__name__} breaks the law") as caught:
        check_exit_policy(cls(**numbers))
    assert caught.value.field in {each.__name__ for each in laws.LAWS}


def holds(law, policy) -> bool:
    try:
        return law(policy)
    except Exception:
        return False


def test_every_law_has_a_mutant_that_it_catches():
    assert {case.values[2] for case in mutants} == {law.__name__ for law in laws.LAWS}


@pytest.mark.parametrize("parent", [ConfidencePolicy, PatiencePolicy, BeemPolicy])
def test_a_copy_without_a_mistake_passes(monkeypatch, parent):
    POLICIES.names()
    numbers = {"thresholds": (1, 1, 2)} if parent is PatiencePolicy else dict(OPEN)
    if parent is BeemPolicy:
        numbers["weights"] = (1.0, 1.0, 1.0, 1.0)
    harmless = dataclass(frozen=True, kw_only=True)(type("Harmless", (parent,), {"__annotations__": {}}))
    monkeypatch.setitem(POLICIES._items, "mutant", harmless)
    assert len(check_exit_policy(harmless(**numbers))) == len(laws.LAWS)


def test_a_policy_that_is_not_registered_is_told_so():
    stranger = dataclass(frozen=True, kw_only=True)(type("Stranger", (ConfidencePolicy,), {}))
    with pytest.raises(PolicyError, match="json round trip is exact': Stranger is not registered"):
        check_exit_policy(stranger(**OPEN))


def test_a_broken_law_is_told_in_words_with_the_class():
    with pytest.raises(PolicyError, match="ComparesWithItsMates breaks the law 'serving equals scan'") as caught:
        check_exit_policy(ComparesWithItsMates(**OPEN))
    assert caught.value.field == "serving_equals_scan"
