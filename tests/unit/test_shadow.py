"""A version in shadow: what is recorded of it, how annotators' answers score it, and what they decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from labelloop import proportions, shadow
from labelloop.artifacts import Bucket
from labelloop.dataset import split_of
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.ledger import Ledger
from labelloop.promotion import Promoter, judge, judge_live
from labelloop.records import (
    Champion,
    Evaluation,
    GateRules,
    Promotion,
    Region,
    Scored,
    Shadow,
    ShadowPair,
    Verdict,
)
from labelloop.retrain import Reconciler
from tests import examples
from tests.fake_label_studio import FakeLabelStudio

RULES = GateRules(margin=0.02, class_floor=0.1, confidence=0.95, shadow=20)
FIRST = examples.champion(1)
SECOND = msgspec.structs.replace(examples.champion(2, b"second"), n_annotations=200, before=1)
RUN = Shadow(challenger=SECOND, champion=FIRST, rules=RULES)
FOLDER = examples.CONFIGS["digits"]


def pair(task: int, says: str = "1", champion_says: str = "1", *, scored: Scored | None = None) -> ShadowPair:
    return ShadowPair(
        model="digits",
        version=2,
        champion=1,
        task=task,
        sha256=examples.sha256(str(task)),
        says=[Region(label=says, score=0.9)],
        champion_says=[Region(label=champion_says, score=0.8)],
        noted_at="2026-01-01T00:00:00.000+00:00",
        scored=scored,
    )


def outcomes(both: int = 0, won: int = 0, lost: int = 0, neither: int = 0, *, labels: Iterable[str] = ("1",)) -> list[ShadowPair]:
    """Scored pairs: right are both, only the challenger, only the champion, neither; the lost ones first."""
    kinds = [(False, True)] * lost + [(True, False)] * won + [(True, True)] * both + [(False, False)] * neither
    names = list(labels)
    return [
        pair(
            number,
            scored=Scored(
                answered_at="2026-01-01T00:00:00Z",
                scored_at=f"2026-01-01T00:{number // 60:02}:{number % 60:02}.000+00:00",
                labels=[names[number % len(names)]],
                challenger=challenger,
                champion=champion,
                seen=number % 2 == 0,
            ),
        )
        for number, (challenger, champion) in enumerate(kinds)
    ]


def in_shadow(version: int = 2, champion: Champion = FIRST, verdict: Verdict = "shadow") -> Promotion:
    return Promotion(
        model="digits",
        job_name=f"job-{version}",
        version=version,
        verdict=verdict,
        reason="better",
        metric="accuracy",
        value=0.95,
        holdout_images=20,
        n_annotations=200,
        decided_at="2026-01-01T00:00:00.000+00:00",
        shadow=Shadow(challenger=SECOND, champion=champion, rules=RULES),
    )


# Which version runs in shadow


def test_the_newest_runs_as_long_as_the_champion_stands() -> None:
    second, third = in_shadow(2), in_shadow(3)
    assert shadow.running([], FIRST) is None
    assert shadow.running([second, third], FIRST) == third
    assert shadow.running([second, in_shadow(3, verdict="keep")], FIRST) == second
    assert shadow.running([second, third], None) is None
    back_again = msgspec.structs.replace(FIRST, promoted_at="2026-02-01T00:00:00.000+00:00", by="rollback")
    assert shadow.running([second, third], back_again) is None, "another version served in between"


def test_only_the_holdout_tells_anything() -> None:
    groups = [examples.sha256(str(number)) for number in range(200)]
    told = [group for group in groups if shadow.counts(group, examples.DIGITS)]
    assert told == [group for group in groups if split_of(group, examples.DIGITS.splits) == "test"] != []
    assert not shadow.counts(None, examples.DIGITS)


# Scoring


@dataclass
class Studio:
    tasks: list[AnnotatedTask] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def annotated_tasks(self, project: int, *, since: Any) -> Iterable[list[AnnotatedTask]]:
        self.asked.append(since.isoformat())
        yield self.tasks


def answered(task: int, label: str, *, seen: str | None = None, by_model: bool = False, at: str = "2026-01-02T00:00:00Z") -> Any:
    made = examples.annotated_task(task, label, updated_at=at)
    plain = msgspec.to_builtins(made.annotations[0])
    plain |= {"created_at": at, "prediction": {"model_version": seen, "result": []} if seen else {}}
    plain |= {"unique_id": "6c616265-6c6c-8000"} if by_model else {}
    exported = {"id": task, "data": made.data, "meta": {"sha256": examples.sha256(str(task))}, "annotations": [plain]}
    return msgspec.json.decode(json.dumps(exported), type=AnnotatedTask)


def score(ledger: Ledger, studio: Studio) -> dict[int, Scored]:
    found = shadow.score(FOLDER, 1, 2, "2026-01-01T12:00:00.000+00:00", ledger, cast(Any, studio))
    assert found == ledger.pairs("digits", 2)
    return {one.task: one.scored for one in found if one.scored}


def test_both_predictions_are_scored_against_what_annotators_submit(ledger: Ledger) -> None:
    ledger.note_pairs([pair(1, "1", "7"), pair(2, "7", "1"), pair(3, "1", "1"), pair(4)])
    studio = Studio([answered(1, "1", seen="digits v1"), answered(2, "1"), answered(3, "2", seen="digits v0"), answered(9, "1")])
    found = score(ledger, studio)
    assert {task: (one.challenger, one.champion, one.seen) for task, one in found.items()} == {
        1: (True, False, True),
        2: (False, True, False),
        3: (False, False, False),
    }
    assert found[3].labels == ["2"]


def test_a_score_stays_and_what_was_read_is_not_read_again(ledger: Ledger) -> None:
    ledger.note_pairs([pair(1), pair(2)])
    studio = Studio([answered(1, "1", at="2026-01-05T00:00:00Z")])
    before = score(ledger, studio)
    studio.tasks = [answered(1, "2", at="2026-01-06T00:00:00Z")]
    assert score(ledger, studio) == before
    assert studio.asked == ["2026-01-01T11:59:00+00:00", "2026-01-04T23:59:00+00:00"]


def test_a_second_note_of_a_task_changes_nothing(ledger: Ledger) -> None:
    ledger.note_pairs([pair(1, "1", "7")])
    score(ledger, Studio([answered(1, "1")]))
    before = ledger.pairs("digits", 2)
    ledger.note_pairs([pair(1, "7", "1")])
    assert ledger.pairs("digits", 2) == before


def test_a_crash_leaves_no_earlier_answer_behind(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next look reads begins with the latest answer that is scored."""
    ledger.note_pairs([pair(1), pair(2)])
    studio = Studio([answered(1, "1", at="2026-01-06T00:00:00Z"), answered(2, "1", at="2026-01-05T00:00:00Z")])
    order: list[int] = []
    kept = ledger.score_pair

    def note(one: ShadowPair) -> None:
        order.append(one.task)
        kept(one)

    monkeypatch.setattr(ledger, "score_pair", note)
    score(ledger, studio)
    assert order == [2, 1]


def test_what_a_model_annotated_or_another_image_says_nothing(ledger: Ledger) -> None:
    ledger.note_pairs([pair(1), pair(2)])
    other = msgspec.structs.replace(answered(2, "1"), meta=msgspec.structs.replace(answered(2, "1").meta, sha256="0" * 64))
    assert score(ledger, Studio([answered(1, "1", by_model=True), other])) == {}


def test_an_erased_pair_does_not_come_back_with_its_score(ledger: Ledger) -> None:
    ledger.note_pairs([pair(1), pair(2)])
    waiting = ledger.pairs("digits", 2)[0]
    assert ledger.forget_images("digits", 1, [waiting.sha256]) == 1
    ledger.score_pair(msgspec.structs.replace(waiting, scored=outcomes(1)[0].scored))
    assert [one.task for one in ledger.pairs("digits", 2)] == [2]


# The statistics


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemars_test_is_the_exact_one(won: int, lost: int) -> None:
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert proportions.mcnemar(won, lost) == pytest.approx(expected, rel=1e-9)


def test_a_class_counts_where_annotators_saw_it() -> None:
    found = shadow.compare(outcomes(both=10, lost=6, won=2, labels=["1", "7"]), 0.95)
    assert (found.images, found.won, found.lost, found.classes) == (18, 2, 6, ["1", "7"])
    assert (found.challenger, found.champion) == (12 / 18, 16 / 18)
    assert found.difference == proportions.proportion(2, 6, 18, 0.95)
    assert found.per_class == {name: proportions.proportion(1, 3, 9, 0.975) for name in "17"}
    assert found.p_value == proportions.mcnemar(2, 6)


@pytest.mark.parametrize(
    ("pairs", "verdict", "reason"),
    [
        (outcomes(both=19), "shadow", "annotators have answered 19 of 20 tasks"),
        (outcomes(both=20), "shadow", "not enough evidence: in shadow right about 100.0% of 20 tasks"),
        (outcomes(both=12, lost=8), "keep", "worse: in shadow right about 60.0% of 20 tasks against version 1's 100.0%"),
        (outcomes(both=12, won=8), "promote", "better: in shadow right about 100.0% of 20 tasks against version 1's 60.0%"),
        (outcomes(both=639, won=1), "promote", "not worse by more than 2 points, and trained on 200 annotations"),
    ],
)
def test_what_answers_decide(pairs: list[ShadowPair], verdict: str, reason: str) -> None:
    found, said, _ = judge_live(RUN, pairs)
    assert (found, said.startswith(reason)) == (verdict, True), said


def test_the_reason_says_what_annotators_had_before_them() -> None:
    _, reason, _ = judge_live(RUN, outcomes(both=12, lost=8))
    assert "alone right about 0 against 8; annotators had version 1's predictions before them in 10" in reason


def test_answers_are_looked_at_when_their_number_has_doubled() -> None:
    """At any number in between chance would get one more try: the first 20 say nothing, and the next 19 are not asked."""
    pairs = outcomes(lost=3, both=17)
    more = [msgspec.structs.replace(one, task=100 + one.task) for one in outcomes(lost=19)]
    later = [
        msgspec.structs.replace(one, scored=msgspec.structs.replace(one.scored, scored_at=f"2026-01-02T00:00:{n:02}.000+00:00"))
        for n, one in enumerate(more)
        if one.scored
    ]
    at_20 = judge_live(RUN, pairs)
    assert at_20[0] == "shadow"
    assert judge_live(RUN, pairs + later) == at_20
    verdict, _, compared = judge_live(RUN, [*pairs, *later, pair(999, scored=later[-1].scored)])
    assert verdict == "keep"
    assert compared is not None
    assert compared.difference == proportions.proportion(0, 23, 40, 1 - 0.05 / 4)
    _, _, at_80 = judge_live(RUN, outcomes(both=80))
    assert at_80 is not None
    assert at_80.difference == proportions.proportion(0, 0, 80, 1 - 0.05 / 8)


# The gate


def report(version: int, accuracy: float, against: int | None = None, *, rules: GateRules = RULES) -> Evaluation:
    champion = examples.scores(against, 0.9) if against else None
    made = examples.evaluation(version, accuracy, champion=champion, job_name=f"job-{version}", onnx_file=b"%d" % version)
    return msgspec.structs.replace(made, gate=rules, n_annotations=100 * version)


def test_what_passes_the_gate_runs_in_shadow_first() -> None:
    assert judge(report(1, 0.9), None)[0] == "promote", "nothing serves that it could run beside"
    verdict, reason = judge(report(2, 0.95, 1), 1)
    assert (verdict, "until annotators have answered 20 tasks" in reason) == ("shadow", True)
    assert judge(report(2, 0.85, 1), 1)[0] == "keep"
    assert judge(report(2, 0.95, 1, rules=msgspec.structs.replace(RULES, shadow=0)), 1)[0] == "promote"


@dataclass
class Gate:
    """Promoter and reconciler on real storage; what they tell others is in memory."""

    bucket: Bucket
    ledger: Ledger
    label_studio: FakeLabelStudio = field(default_factory=FakeLabelStudio)
    announced: list[Promotion] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)  # versions
    recalled: list[str] = field(default_factory=list)
    tags: dict[int, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger.set_project("digits", 1)
        self.promoter = Promoter(self.bucket, self.ledger, cast(Any, self), self.announced.append, self._count, log=print)
        self.reconciler = Reconciler(
            "local",
            examples.CONFIGS,
            self.bucket,
            self.ledger,
            cast(Any, self.label_studio),
            cast(Any, None),
            lambda _, job: self.recalled.append(job),
            log=lambda *_, **__: None,
        )

    def _count(self, promotion: Promotion) -> None:
        self.counted.append(promotion.version)

    def tag(self, model: str, version: int, tags: dict[str, str]) -> None:
        self.tags[version] = tags

    def set_alias(self, model: str, alias: str, version: int) -> None:
        pass

    def train(self, made: Evaluation) -> Promotion:
        key = f"training/digits/{made.job_name}/output/model.tar.gz"
        self.bucket.put(key, examples.model_archive(made, b"%d" % made.challenger.version))
        return self.decide(made.challenger.version)

    def decide(self, version: int) -> Promotion:
        decided = self.promoter.decide("digits", f"job-{version}")
        assert decided is not None
        return decided

    def answer(self, pairs: list[ShadowPair]) -> None:
        self.ledger.note_pairs([msgspec.structs.replace(one, scored=None) for one in pairs])
        for one in pairs:
            self.ledger.score_pair(one)

    @property
    def serves(self) -> int:
        return int(json.loads(self.bucket.get("champions/digits.json") or b"{}")["version"])


@pytest.fixture
def gate(bucket: Bucket, ledger: Ledger) -> Gate:
    gate = Gate(bucket, ledger)
    gate.train(report(1, 0.9))
    return gate


def test_in_shadow_a_version_does_not_serve_and_everybody_is_told(gate: Gate) -> None:
    begun = gate.train(report(2, 0.95, 1))
    assert (begun.verdict, gate.serves, gate.announced[-1]) == ("shadow", 1, begun)
    assert begun.shadow is not None
    assert (begun.shadow.challenger.version, begun.shadow.champion.version) == (2, 1)
    assert gate.bucket.get("models/digits/2/model.onnx") == b"2", "prelabel finds it"
    assert gate.tags[2]["verdict"] == "shadow"
    assert gate.decide(2) == begun, "too little is known"


@pytest.mark.parametrize(
    ("pairs", "verdict", "serves"), [(outcomes(both=12, won=8), "promote", 2), (outcomes(both=12, lost=8), "keep", 1)]
)
def test_answers_let_it_serve_or_end_its_run(gate: Gate, pairs: list[ShadowPair], verdict: str, serves: int) -> None:
    gate.train(report(2, 0.95, 1))
    gate.answer(pairs)
    ended = gate.decide(2)
    assert (ended.verdict, gate.serves) == (verdict, serves)
    assert ended.live == judge_live(RUN, pairs)[2]
    assert gate.tags[2] == {"verdict": verdict, "verdict_reason": ended.reason}
    assert gate.ledger.takeovers("digits")[-1].version == serves
    assert gate.decide(2) == ended, "a late message changes nothing"
    assert gate.serves == serves
    assert gate.counted == [1, 2], "each training once, however often it is decided about"


def test_a_newer_version_takes_its_place(gate: Gate) -> None:
    gate.train(report(2, 0.95, 1))
    gate.train(report(3, 0.96, 1))
    gate.answer(outcomes(both=12, won=8))
    ended = gate.decide(2)
    assert (ended.verdict, gate.serves) == ("undecided", 1)
    assert ended.reason.startswith("version 3 runs in shadow in its place")
    assert gate.decide(3).verdict == "shadow"


def test_a_person_who_moves_the_pointer_ends_its_run(gate: Gate) -> None:
    gate.train(report(2, 0.95, 1))
    gate.answer(outcomes(both=12, won=8))
    pointer, tag = gate.promoter._champions.read_tagged("digits")
    assert pointer is not None
    again = msgspec.structs.replace(pointer, promoted_at="2027-01-01T00:00:00.000+00:00", by="rollback", before=5)
    gate.promoter._champions.swap(again, tag=tag)
    ended = gate.decide(2)
    assert (ended.verdict, gate.serves) == ("undecided", 1)
    assert "but version 1 serves since" in ended.reason


def test_a_person_who_lets_it_serve_ends_its_run(gate: Gate) -> None:
    begun = gate.train(report(2, 0.95, 1))
    assert begun.shadow is not None
    _, tag = gate.promoter._champions.read_tagged("digits")
    gate.promoter._champions.swap(msgspec.structs.replace(begun.shadow.challenger, by="promote"), tag=tag)
    ended = gate.decide(2)
    assert (ended.verdict, gate.serves) == ("undecided", 2)
    assert "let serve by hand" in ended.reason


@pytest.mark.parametrize("step", ["record_takeover", "end_shadow"])
def test_a_crash_after_the_swap_heals(gate: Gate, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    gate.train(report(2, 0.95, 1))
    gate.answer(outcomes(both=12, won=8))

    def crash(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(gate.ledger, step, crash)
        with pytest.raises(RuntimeError):
            gate.decide(2)
    assert gate.serves == 2
    ended = gate.decide(2)
    assert (ended.verdict, [one.version for one in gate.ledger.takeovers("digits")]) == ("promote", [1, 2])


def test_the_first_end_that_is_noted_stays_unless_it_serves(ledger: Ledger) -> None:
    begun = in_shadow()
    assert ledger.record_promotion(begun) == begun
    kept = msgspec.structs.replace(begun, verdict="keep")
    assert ledger.end_shadow(kept) == kept
    assert ledger.end_shadow(msgspec.structs.replace(begun, verdict="undecided")) == kept
    assert ledger.record_promotion(begun) == kept, "a late first decision"
    promoted = msgspec.structs.replace(begun, verdict="promote")
    assert ledger.end_shadow(promoted) == ledger.promotion("digits", "job-2") == promoted


# The looks that drive it


def test_a_look_scores_and_calls_promote_when_it_is_time(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reconciler, "_settle", lambda *_: pytest.skip("enough"))
    gate.train(report(2, 0.95, 1))
    gate.ledger.note_pairs([pair(number, "7", "1") for number in range(1, 21)])
    gate.label_studio.clock = None
    look: Callable[[], None] = lambda: gate.reconciler._follow_shadow("digits")  # noqa: E731
    studio = Studio([answered(number, "1") for number in range(1, 20)])
    vars(gate.reconciler)["_label_studio"] = studio
    look()
    assert gate.recalled == []
    studio.tasks.append(answered(20, "1"))
    look()
    assert gate.recalled == ["job-2"]
    assert gate.decide(2).verdict == "keep"
    look()
    assert gate.recalled == ["job-2"], "nothing runs in shadow"


def test_a_look_calls_promote_for_a_run_that_something_else_ended(gate: Gate) -> None:
    gate.train(report(2, 0.95, 1))
    gate.train(report(3, 0.95, 1))
    gate.reconciler._follow_shadow("digits")
    assert gate.recalled == ["job-2"]
