"""The promotion gate: `judge` decides; `Promoter` acts in steps that may be repeated and interrupted."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelloop import artifacts, promotion
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import ConflictError, ModelError, RegistryError
from labelloop.ledger import Ledger
from labelloop.promotion import Promoter, judge, not_worse, unpack
from labelloop.records import Champion, Comparison, Evaluation, Interval, Promotion, Scores, Training, Verdict
from labelloop.registry import Registry
from tests import examples
from tests.recording_server import Answer, RecordingServer, serving

JOB = "labelloop-local-digits-abc-1"


def judged(compared: Comparison, *, more: bool = True) -> tuple[Verdict, str]:
    """What the gate says of a comparison; the challenger has 100 annotations, the champion fewer, or as many."""
    report = examples.evaluation(2, 0.9, champion=examples.scores(1, 0.9), compared=compared)
    return judge(msgspec.structs.replace(report, champion_annotations=50 if more else 100), 1)


def test_a_challenger_that_is_evidently_better_takes_over() -> None:
    verdict, reason = judged(examples.comparison(0.95, 0.9, spread=0.04), more=False)
    assert verdict == "promote"
    assert reason == ("better: accuracy 95.0% against version 1's 90.0% on 20 holdout images, +5.0 points (+1.0 to +9.0)")


def test_a_challenger_that_is_evidently_worse_is_kept() -> None:
    verdict, reason = judged(examples.comparison(0.88, 0.9, spread=0.015))
    assert verdict == "keep"
    assert reason == "worse: accuracy 88.0% against version 1's 90.0% on 20 holdout images, -2.0 points (-3.5 to -0.5)"


def test_one_within_the_margin_takes_over_when_it_knows_more_annotations() -> None:
    compared = examples.comparison(0.895, 0.9, spread=0.014)
    verdict, reason = judged(compared)
    assert verdict == "promote"
    assert "not worse by more than 2 points, and trained on 100 annotations instead of 50" in reason
    verdict, reason = judged(compared, more=False)
    assert verdict == "undecided"
    assert "no more annotations" in reason


def test_one_that_may_be_worse_by_more_than_the_margin_stays_out_and_what_would_decide_is_said() -> None:
    verdict, reason = judged(examples.comparison(0.92, 0.9, spread=0.05, needed=1234))
    assert verdict == "undecided"
    assert "+2.0 points (-3.0 to +7.0)" in reason
    assert "about 1,234 holdout images would decide" in reason


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Interval(value=-0.2, low=-0.4, high=-0.01), "keep"),
        (Interval(value=-0.2, low=-0.4, high=0.01), "promote"),
        (Interval(value=-0.09, low=-0.1, high=-0.01), "promote"),
    ],
    ids=["falls too far", "perhaps by chance", "within the floor"],
)
def test_no_class_may_evidently_fall_too_far_whatever_the_total(change: Interval, verdict: Verdict) -> None:
    unsure = Interval(value=-0.5, low=-0.9, high=0.1)
    compared = examples.comparison(0.99, 0.9, per_class={"3": unsure, "7": change, "8": examples.interval(0.5, 0.1)})
    found, reason = judged(compared)
    assert found == verdict
    if found == "keep":
        assert "the class 7 falls too far, -20.0 points (-40.0 to -1.0); class_floor allows 10" in reason
    assert not_worse(compared, examples.evaluation().gate) is (verdict == "promote")


@pytest.mark.parametrize(
    ("challenger", "spread", "wanted"),
    [(0.9, 0.019, True), (0.9, 0.021, False), (0.895, 0.004, False), (0.895, 0.006, True)],
    ids=["within the margin", "perhaps beyond it", "evidently worse, within the margin", "perhaps as good"],
)
def test_int8_may_lose_nothing_that_is_evident_and_not_the_margin(challenger: float, spread: float, wanted: bool) -> None:
    assert not_worse(examples.comparison(challenger, 0.9, spread=spread), examples.evaluation().gate) is wanted


def test_where_nothing_can_be_compared_a_person_decides() -> None:
    report = examples.evaluation(2, 0.9, champion=examples.scores(1, 0.9))
    verdict, reason = judge(msgspec.structs.replace(report, comparison=None), 1)
    assert verdict == "undecided"
    assert "labelloop promote digits" in reason


def test_a_comparison_on_some_classes_says_so() -> None:
    _, reason = judged(examples.comparison(0.95, 0.9, classes=["1", "2"]))
    assert "20 holdout images of the 2 classes that both know" in reason


def test_the_first_version_takes_over() -> None:
    verdict, reason = judge(examples.evaluation(1, 0.1), None)
    assert verdict == "promote"
    assert reason.startswith("the first version: accuracy 10.0% on ")
    assert reason.endswith(", which tell nothing of 0, 1, 2, 3, 4 and 5 more")
    for shown, said in (("023456789", " which tell nothing of 1"), ("0123456789", " on 20 holdout images")):
        scores = msgspec.structs.replace(examples.scores(1, 0.1), per_class=dict.fromkeys(shown, 0.1))
        report = msgspec.structs.replace(examples.evaluation(), challenger=scores)
        assert judge(report, None)[1].endswith(said)


@pytest.mark.parametrize("compared", [None, examples.scores(1, 0.0)], ids=["with nothing", "with an older champion"])
def test_a_challenger_that_was_compared_with_another_is_kept(compared: Scores | None) -> None:
    verdict, reason = judge(examples.evaluation(3, 1.0, champion=compared), 2)
    assert verdict == "keep"
    assert "version 2 serves now" in reason


@dataclass
class Gate:
    """A promoter on real storage, with what it told the registry and everybody else."""

    bucket: Bucket
    ledger: Ledger
    mlflow: RecordingServer
    announced: list[Promotion] = field(default_factory=list)
    counted: list[Promotion] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.champions = Champions(self.bucket)
        registry = Registry(self.mlflow.url)
        self.promoter = Promoter(self.bucket, self.ledger, registry, self.announced.append, self.counted.append, log=self._note)

    def _note(self, message: str, **fields: object) -> None:
        self.logged.append(f"{message}: version {fields['version']}")

    def train(self, report: Evaluation, onnx: bytes = b"onnx", *, archive: bytes | None = None) -> None:
        """Leave what a training job leaves."""
        key = artifacts.training_archive_key("digits", report.job_name)
        self.bucket.put(key, examples.model_archive(report, onnx) if archive is None else archive)

    def decide(self, job: str = JOB) -> Promotion:
        decided = self.promoter.decide("digits", job)
        assert decided is not None
        return decided

    @property
    def champion(self) -> Champion | None:
        return self.champions.read("digits")

    @property
    def tags(self) -> dict[str, dict[str, str]]:
        """Version → tags, as MLflow would hold them."""
        found: dict[str, dict[str, str]] = {}
        for request in self.mlflow.requests:
            if request.path.endswith("model-versions/set-tag"):
                found.setdefault(request.json["version"], {})[request.json["key"]] = request.json["value"]
        return found

    @property
    def aliases(self) -> dict[str, str]:
        """Alias → version, as MLflow would hold them."""
        paths = "/api/2.0/mlflow/registered-models/alias"
        return {r.json["alias"]: r.json["version"] for r in self.mlflow.requests if r.path == paths}


@pytest.fixture
def gate(bucket: Bucket, ledger: Ledger) -> Iterator[Gate]:
    with serving() as mlflow:
        yield Gate(bucket, ledger, mlflow)


def second(accuracy: float, *, against: float = 0.9) -> Evaluation:
    return examples.evaluation(2, accuracy, champion=examples.scores(1, against), job_name="job-2", onnx_file=b"second")


def test_the_first_version_serves_and_everybody_knows(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    decided = gate.decide()
    assert (decided.verdict, decided.version, decided.holdout_images, decided.n_annotations) == ("promote", 1, 20, 100)
    assert gate.champion is not None
    assert (gate.champion.version, gate.champion.value, gate.champion.n_annotations) == (1, 0.9, 100)
    assert gate.champions.onnx(gate.champion) == b"onnx"
    assert gate.champions.evaluation("digits", 1) == examples.evaluation(1, 0.9)
    assert gate.ledger.promotion("digits", JOB) == decided
    assert gate.tags == {"1": {"verdict": "promote", "verdict_reason": decided.reason}}
    assert gate.aliases == {"champion": "1"}
    assert gate.announced == [decided]


def test_a_better_challenger_takes_over(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    gate.train(second(0.95), b"second")
    assert gate.decide("job-2").verdict == "promote"
    assert gate.champion is not None
    assert gate.champion.version == 2
    assert gate.champions.onnx(gate.champion) == b"second"
    assert gate.aliases == {"champion": "2"}


def test_a_worse_challenger_never_serves_and_its_tags_say_why(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    gate.train(second(0.85), b"second")
    decided = gate.decide("job-2")
    assert decided.verdict == "keep"
    assert gate.champion is not None
    assert gate.champion.version == 1
    assert gate.tags["2"] == {
        "verdict": "keep",
        "verdict_reason": ("worse: accuracy 85.0% against version 1's 90.0% on 20 holdout images, -5.0 points (-6.0 to -4.0)"),
    }
    assert gate.aliases == {"champion": "1", "challenger": "2"}
    assert gate.champions.evaluation("digits", 2) is not None, "its report is kept"


def test_an_undecided_challenger_is_kept_as_challenger_and_everybody_is_told(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    compared = examples.comparison(0.92, 0.9, spread=0.1, needed=500)
    report = msgspec.structs.replace(second(0.92), comparison=compared, suspects=[examples.suspect()])
    gate.train(report, b"second")
    decided = gate.decide("job-2")
    assert decided.verdict == "undecided"
    assert gate.champion is not None
    assert gate.champion.version == 1
    assert gate.aliases == {"champion": "1", "challenger": "2"}
    assert gate.announced[-1] == decided
    assert (decided.difference, decided.calibration_error, decided.suspects) == (compared.difference, 0.02, 1)
    assert [takeover.version for takeover in gate.ledger.takeovers("digits")] == [1]


def test_every_takeover_is_noted_once(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    gate.train(second(0.95), b"second")
    decided = gate.decide("job-2")
    gate.decide("job-2")
    assert [(t.version, t.before, t.by) for t in gate.ledger.takeovers("digits")] == [(1, None, "gate"), (2, 1, "gate")]
    assert gate.ledger.takeovers("digits")[1].reason == decided.reason
    assert gate.champion is not None
    assert gate.champion.takeover == gate.ledger.takeovers("digits")[1]


def test_deciding_again_changes_nothing_and_announces_again(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    first = gate.decide()
    pointer = gate.champions.read_tagged("digits")
    assert gate.decide() == first
    assert gate.champions.read_tagged("digits") == pointer
    assert (gate.announced, gate.counted) == ([first, first], [first])


def test_a_late_repeat_does_not_bring_an_old_version_back(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    gate.train(second(0.95), b"second")
    gate.decide("job-2")
    gate.decide()
    assert gate.champion is not None
    assert gate.champion.version == 2
    assert gate.aliases == {"champion": "2"}


@pytest.mark.parametrize(
    ("step", "accuracy", "verdict", "serves"),
    [("record_takeover", 0.95, "promote", 2), ("record_promotion", 0.95, "promote", 2), ("record_promotion", 0.85, "keep", 1)],
)
def test_a_crash_before_a_note_heals(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, step: str, accuracy: float, verdict: str, serves: int
) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    gate.train(second(accuracy), b"second")
    with monkeypatch.context() as patch:
        patch.setattr(gate.ledger, step, crash)
        with pytest.raises(Crash):
            gate.decide("job-2")
    assert gate.champion is not None
    assert gate.champion.version == serves, "the pointer was swapped before the crash"
    assert gate.ledger.promotion("digits", "job-2") is None
    decided = gate.decide("job-2")
    assert (decided.verdict, decided.version) == (verdict, 2)
    assert "version 1's 90.0%" in decided.reason, "the reason is the one of the swap"
    assert gate.champion.version == serves
    assert gate.announced[-1] == decided
    assert [takeover.version for takeover in gate.ledger.takeovers("digits")] == [1, 2][:serves]


@pytest.mark.parametrize("noted", [False, True], ids=["in the pointer alone", "in the ledger alone"])
def test_a_decision_that_comes_again_after_a_rollback_leaves_the_rollback(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    gate.train(second(0.95), b"second")
    with monkeypatch.context() as patch:
        patch.setattr(gate.ledger, "record_promotion" if noted else "record_takeover", crash)
        with pytest.raises(Crash):
            gate.decide("job-2")
    _, tag = gate.champions.read_tagged("digits")
    first = examples.champion(1)
    rolled_back = msgspec.structs.replace(
        first, by="rollback", before=None if noted else 2, promoted_at="2026-01-02T00:00:00.000+00:00"
    )
    gate.champions.swap(rolled_back, tag=tag)
    decided = gate.decide("job-2")
    assert gate.champion == rolled_back
    assert (decided.verdict, decided.version) == ("promote", 2), "what it was when it took over"
    assert gate.aliases["champion"] == "1"


def test_a_crash_before_the_first_swap_heals(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.train(examples.evaluation(1, 0.9))
    with monkeypatch.context() as patch:
        patch.setattr(gate.promoter._champions, "swap", crash)
        with pytest.raises(Crash):
            gate.decide()
    assert gate.champion is None
    assert gate.decide().verdict == "promote"
    assert gate.champion is not None


class Crash(Exception):
    pass


def crash(*_: object, **__: object) -> None:
    raise Crash


def test_a_registry_that_fails_is_told_again_later(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.mlflow.answer = lambda _: Answer(500, {"error_code": "INTERNAL_ERROR"})
    with pytest.raises(RegistryError, match="500"):
        gate.decide()
    assert gate.announced == []
    gate.mlflow.answer = lambda _: Answer()
    decided = gate.decide()
    assert gate.aliases == {"champion": "1"}
    assert gate.announced == gate.counted == [decided]


GONE = Answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Model Version (name=digits, version=1) not found"})


def test_a_version_that_was_deleted_in_mlflow_serves_and_everybody_else_is_told(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.mlflow.answer = lambda _: GONE
    decided = gate.decide()
    assert gate.announced == [decided]
    assert gate.champion is not None
    assert gate.champion.version == 1
    assert gate.logged == ["not in MLflow: version 1"]


def test_an_address_where_no_mlflow_is_is_an_error(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.mlflow.answer = lambda _: Answer(404, b"<h1>Not Found</h1>")
    with pytest.raises(RegistryError, match="404"):
        gate.decide()
    assert gate.announced == []


def test_a_job_that_left_nothing_is_nothing_to_decide_about(gate: Gate) -> None:
    assert gate.promoter.decide("digits", "failed-job") is None
    assert gate.announced == []


def test_a_completed_job_whose_archive_is_missing_is_decided_about(gate: Gate) -> None:
    """Otherwise the next training would wait for a decision for ever."""
    job = examples.job("job-9")
    head = gate.ledger.claim(gate.ledger.head("digits"), job)
    assert gate.promoter.decide("digits", "job-9") is None, "it may still come"
    gate.ledger.finish(head, head, Training(job=job, status="completed"))
    decided = gate.decide("job-9")
    assert (decided.verdict, decided.version) == ("keep", 0)
    assert "archive is missing" in decided.reason


DAMAGED = {
    "no archive": b"this is no archive",
    "empty": b"",
    "cut off": examples.model_archive(examples.evaluation())[:-40],
    "no report": examples.model_archive(b""),
    "a report of another form": examples.model_archive(b'{"model": "digits"}'),
    "a report that is no text": examples.model_archive(b'{"model": "\xff"}'),
    "another model file": examples.model_archive(examples.evaluation(), b"other"),
    "another job's report": examples.model_archive(examples.evaluation(job_name="other-job")),
    "another model's report": examples.model_archive(examples.evaluation(model="faces")),
}


@pytest.mark.parametrize("archive", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_archive_is_kept_from_serving_and_said_so(gate: Gate, archive: bytes) -> None:
    gate.train(examples.evaluation(), archive=archive)
    decided = gate.decide()
    assert (decided.verdict, decided.version, decided.job_name) == ("keep", 0, JOB)
    assert decided.reason
    assert gate.champion is None
    assert gate.ledger.promotion("digits", JOB) == decided
    assert gate.mlflow.requests == [], "there is no version to tag"
    assert gate.announced == [decided]


def test_a_registry_that_counts_anew_replaces_no_version(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    before = gate.champion
    gate.train(examples.evaluation(1, 0.95, job_name="job-2", onnx_file=b"another"), b"another")
    decided = gate.decide("job-2")
    assert (decided.verdict, decided.version) == ("keep", 0)
    assert f"as it did {JOB}'s model" in decided.reason
    assert gate.champion == before
    assert gate.bucket.get(artifacts.onnx_key("digits", 1)) == b"onnx"


def test_of_two_promotions_at_once_one_wins_and_the_other_decides_again(gate: Gate) -> None:
    gate.train(examples.evaluation(1, 0.9))
    gate.decide()
    gate.train(second(0.95), b"second")
    third = examples.evaluation(3, 0.96, champion=examples.scores(1, 0.9), job_name="job-3", onnx_file=b"third")
    gate.train(third, b"third")

    def decide(job: str) -> str:
        try:
            return gate.decide(job).verdict
        except ConflictError:
            return "conflict"

    with ThreadPoolExecutor(2) as threads:
        verdicts = dict(zip(("job-2", "job-3"), threads.map(decide, ("job-2", "job-3")), strict=True))
    assert list(verdicts.values()).count("promote") == 1
    again = {job: gate.decide(job).verdict for job in verdicts}
    assert sorted(again.values()) == ["keep", "promote"]
    assert gate.champion is not None
    assert gate.champion.version == (2 if again["job-2"] == "promote" else 3)


@pytest.mark.parametrize("prefix", ["", "./"])
def test_an_archive_is_unpacked(prefix: str) -> None:
    assert unpack(examples.model_archive(examples.evaluation(), prefix=prefix)) == (b"onnx", examples.evaluation())


def test_a_member_that_is_no_file_is_refused() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        link = tarfile.TarInfo("model.onnx")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ModelError, match=r"holds no model\.onnx"):
        unpack(file.getvalue())


def test_a_member_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "_MAX_MODEL_BYTES", 3)
    with pytest.raises(ModelError, match="4 bytes"):
        unpack(examples.model_archive(examples.evaluation()))


ARCHIVE = examples.model_archive(examples.evaluation(), bytes(range(256)) * 40)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(ARCHIVE)))
def test_a_damaged_archive_raises_nothing_but_a_model_error(changes: list[tuple[int, int]], length: int) -> None:
    damaged = bytearray(ARCHIVE)
    for place, value in changes:
        damaged[place] = value
    for archive in (bytes(damaged), bytes(damaged[:length])):
        with suppress(ModelError):
            unpack(archive)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_tar_in_a_sound_gzip_raises_nothing_but_a_model_error(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(gzip.decompress(examples.model_archive(examples.evaluation())))
    for place, value in changes:
        damaged[place % len(damaged)] = value
    with suppress(ModelError):
        unpack(gzip.compress(bytes(damaged), 1))
