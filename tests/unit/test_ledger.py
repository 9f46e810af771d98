"""The ledger on a real DynamoDB API: conditional writes decide between rivals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import boto3
import msgspec
import pytest

from labelloop.errors import ConflictError, NotSetUpError, StorageError
from labelloop.ledger import Ledger
from labelloop.records import Head, Promotion, Trained, Training
from tests import examples
from tests.fake_aws import FakeDynamoDB


def test_a_model_without_a_project_says_what_to_run(ledger: Ledger) -> None:
    with pytest.raises(NotSetUpError, match="setup-label-studio-project digits"):
        ledger.project("digits")
    ledger.set_project("digits", 7)
    ledger.set_project("digits", 8)
    assert ledger.project("digits") == 8


def test_a_claim_makes_a_job_the_running_one(ledger: Ledger) -> None:
    assert ledger.head("digits") == Head(model="digits")
    job = examples.job()
    claimed = ledger.claim(ledger.head("digits"), job)
    assert claimed.sequence == 1
    assert ledger.head("digits") == claimed
    assert ledger.head("digits").running == job
    assert ledger.training("digits", job.job_name) == Training(job=job, status="running")
    assert ledger.head("faces") == Head(model="faces")


def test_finishing_advances_the_sequence_and_the_history(ledger: Ledger) -> None:
    job = examples.job()
    head = ledger.claim(ledger.head("digits"), job)
    trained = Trained(digest=job.digest, n_annotations=100, job_name=job.job_name, ended_at="2026-01-01T01:00:00+00:00")
    training = Training(job=job, status="completed", ended_at=trained.ended_at)
    after = ledger.finish(head, msgspec.structs.replace(head, trained=trained), training)
    assert (after.sequence, after.running, after.trained) == (2, None, trained)
    assert ledger.head("digits") == after
    assert ledger.trainings("digits") == [training]


def test_a_history_longer_than_one_answer_is_read_to_its_end() -> None:
    ledger = Ledger("ledger", client=FakeDynamoDB())
    jobs = [msgspec.structs.replace(examples.job(f"job-{n}"), started_at=f"2026-01-0{n}T00:00:00+00:00") for n in range(1, 6)]
    for job in jobs:
        head = ledger.claim(ledger.head("digits"), job)
        ledger.finish(head, msgspec.structs.replace(head, running=None), Training(job=job, status="completed"))
    assert [training.job for training in ledger.trainings("digits")] == jobs


@pytest.mark.parametrize("first", [True, False], ids=["first claim", "later claim"])
def test_a_head_that_was_read_before_another_change_claims_nothing(ledger: Ledger, first: bool) -> None:
    stale = ledger.head("digits")
    if not first:
        head = ledger.claim(stale, examples.job("job-0"))
        stale = ledger.finish(head, head, Training(job=examples.job("job-0"), status="failed"))
    ledger.claim(stale, examples.job("job-1"))
    with pytest.raises(ConflictError):
        ledger.claim(stale, examples.job("job-2"))
    with pytest.raises(ConflictError):
        ledger.finish(stale, stale, Training(job=examples.job("job-1"), status="completed"))
    assert ledger.training("digits", "job-2") is None
    running = ledger.head("digits").running
    assert running is not None
    assert running.job_name == "job-1"


def test_a_job_name_is_claimed_only_once(ledger: Ledger) -> None:
    head = ledger.claim(ledger.head("digits"), examples.job("job-1"))
    head = ledger.finish(head, head, Training(job=examples.job("job-1"), status="failed", failure="why"))
    with pytest.raises(ConflictError):
        ledger.claim(head, examples.job("job-1"))
    training = ledger.training("digits", "job-1")
    assert training is not None
    assert training.failure == "why"


def test_of_many_claims_at_once_exactly_one_wins(ledger: Ledger) -> None:
    head = ledger.head("digits")

    def claim(number: int) -> bool:
        try:
            ledger.claim(head, examples.job(f"job-{number}"))
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(claim, range(8)))
    assert won.count(True) == 1
    running = ledger.head("digits").running
    assert running is not None
    assert running.job_name == f"job-{won.index(True)}"
    assert len(ledger.trainings("digits")) == 1


def test_trainings_come_in_the_order_they_started(ledger: Ledger) -> None:
    head = ledger.head("digits")
    for name, started_at in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c", "2026-01-01")):
        job = msgspec.structs.replace(examples.job(name), started_at=started_at)
        head = ledger.claim(head, job)
        head = ledger.finish(head, head, Training(job=job, status="completed"))
    assert [training.job.job_name for training in ledger.trainings("digits")] == ["c", "b", "a"]


def test_promotions_are_found_by_job(ledger: Ledger) -> None:
    promotion = Promotion(
        model="digits",
        job_name="job-1",
        version=3,
        verdict="keep",
        reason="worse",
        metric="accuracy",
        value=0.5,
        holdout_images=20,
        n_annotations=100,
        decided_at="2026-01-01",
    )
    assert ledger.promotion("digits", "job-1") is None
    ledger.record_promotion(promotion)
    assert ledger.promotion("digits", "job-1") == promotion
    assert ledger.promotions("digits") == {"job-1": promotion}
    assert ledger.promotions("faces") == {}


def test_an_image_is_claimed_once_until_its_lease_ends(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000_000.0]
    monkeypatch.setattr("labelloop.ledger.time", SimpleNamespace(time=lambda: clock[0]))
    image = ("digits", 1, "a" * 64, "s3://images/a.png")
    assert ledger.claim_image(*image).state == "new"
    assert ledger.claim_image(*image).state == "busy"
    clock[0] += 89
    assert ledger.claim_image(*image).state == "busy"
    clock[0] += 2
    assert ledger.claim_image(*image).state == "retry"
    assert ledger.claim_image(*image).state == "busy"
    ledger.images_done("digits", 1, {"a" * 64: "s3://images/a.png"})
    assert ledger.claim_image(*image).state == "done"
    clock[0] += 1_000
    assert ledger.claim_image(*image).state == "done"
    assert ledger.claim_image("digits", 2, "a" * 64, "s3://images/a.png").state == "new", "another project has its own tasks"
    assert ledger.claim_image("faces", 1, "a" * 64, "s3://images/a.png").state == "new"


def test_a_retry_knows_under_which_address_the_image_was_claimed_before(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000_000.0]
    monkeypatch.setattr("labelloop.ledger.time", SimpleNamespace(time=lambda: clock[0]))
    assert ledger.claim_image("digits", 1, "a" * 64, "s3://images/first.png").before is None
    clock[0] += 1_000
    claim = ledger.claim_image("digits", 1, "a" * 64, "s3://images/second.png")
    assert (claim.state, claim.before) == ("retry", "s3://images/first.png")


def test_of_many_claims_of_an_image_exactly_one_is_new(ledger: Ledger) -> None:
    with ThreadPoolExecutor(8) as threads:
        claims = list(threads.map(lambda _: ledger.claim_image("digits", 1, "a" * 64, "s3://b/k").state, range(8)))
    assert sorted(claims) == ["busy"] * 7 + ["new"]


def test_more_images_than_a_batch_holds_are_noted(ledger: Ledger) -> None:
    images = {f"{number:064x}": f"s3://images/{number}.png" for number in range(60)}
    ledger.images_done("digits", 1, images)
    assert {ledger.claim_image("digits", 1, sha256, "x").state for sha256 in images} == {"done"}


def test_a_missing_table_is_a_storage_error(aws: str) -> None:
    missing = Ledger("no-such-table", boto3.client("dynamodb"))
    with pytest.raises(StorageError):
        missing.head("digits")
    with pytest.raises(StorageError):
        missing.claim(Head(model="digits"), examples.job())
    with pytest.raises(StorageError):
        missing.claim_image("digits", 1, "a" * 64, "x")
    with pytest.raises(StorageError):
        missing.images_done("digits", 1, {"a" * 64: "x"})
