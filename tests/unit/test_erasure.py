"""`labelloop erase`: real buckets with versions, a real ledger, and an MLflow that keeps files; after it nothing is left."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import erasure
from cli.deployment import Deployment
from cli.erasure import Erased, Eraser
from cli.lineage import Lineage
from cli.main import app
from labelloop import artifacts, imaging, snapshot_index
from labelloop.artifacts import Bucket, Champions, s3_uri
from labelloop.duplicates import Groups, fingerprint
from labelloop.errors import ConflictError, LabelStudioError, RequestError
from labelloop.label_studio.client import KnownTask
from labelloop.label_studio.payloads import AnnotatedTask
from labelloop.ledger import Ledger
from labelloop.promotion import Promoter, unpack
from labelloop.records import Audit, Evaluation, HoldoutImage, Region, ReviewCase, Shard, Training
from labelloop.registry import Registry
from labelloop.snapshot_index import SnapshotIndex, opened
from tests import examples
from tests.recording_server import Answer, RecordingServer, Request, serving

PROJECT = 7
NOON = "2026-01-01T12:00:00.000+00:00"
DIGITS = examples.CONFIGS["digits"]
SECRET, OTHER = examples.png(3, salt=1), examples.png(5, salt=2)
HASH, OTHER_HASH = examples.sha256(SECRET), examples.sha256(OTHER)


class Crash(Exception):
    pass


@dataclass
class LabelStudio:
    tasks_: dict[int, KnownTask] = field(default_factory=dict)
    annotated: list[AnnotatedTask] = field(default_factory=list)

    def tasks(self, project: int, data_key: str) -> Iterator[KnownTask]:
        assert (project, data_key) == (PROJECT, "image")
        return iter(list(self.tasks_.values()))

    def delete_task(self, task: int) -> None:
        self.tasks_.pop(task)
        self.annotated = [one for one in self.annotated if one.id != task]

    def annotated_tasks(self, project: int) -> Iterator[list[AnnotatedTask]]:
        yield list(self.annotated)


@dataclass
class Mlflow:
    """Runs with their snapshots, and their files by path."""

    address: str = "mlflow-artifacts:/1/{run}/artifacts"
    runs: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # that differ from the run's id
    files: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, request: Request) -> Answer:
        path = unquote(request.path)
        if "experiments/get-by-name" in path:
            return Answer(200, {"experiment": {"experiment_id": "1"}}) if self.runs else Answer(404)
        if path.endswith("runs/search"):
            digest = request.json["filter"].split("'")[1]
            found = [run for run, of in self.runs.items() if of == digest]
            return Answer(
                body={
                    "runs": [
                        {"info": {"run_id": r, "run_name": self.names.get(r, r), "artifact_uri": self.address.format(run=r)}}
                        for r in found
                    ]
                }
            )
        file = path.partition("/mlflow-artifacts/artifacts/")[2]
        if request.method == "PUT":
            self.files[file] = request.body
            return Answer()
        if file:
            return Answer(200, self.files[file]) if file in self.files else Answer(404)
        return Answer()


@dataclass
class SageMaker:
    """Training jobs that run, by name, and the folder that each writes to."""

    running: dict[str, str] = field(default_factory=dict)

    def __call__(self, request: Request) -> Answer:
        if request.headers["x-amz-target"] == "SageMaker.DescribeTrainingJob":
            name = request.json["TrainingJobName"]
            return Answer(body={"TrainingJobName": name, "OutputDataConfig": {"S3OutputPath": self.running[name]}})
        asked = request.json
        listed = [name for name in self.running if asked["StatusEquals"] == "Stopping" and asked["NameContains"] in name]
        return Answer(body={"TrainingJobSummaries": [{"TrainingJobName": name} for name in listed]})


@dataclass
class Stage:
    """A model with a secret image under two names, and another one, that two versions have seen."""

    deployment: Deployment
    ledger: Ledger
    images: Bucket
    artifacts: Bucket
    label_studio: LabelStudio
    mlflow: Mlflow
    sagemaker: SageMaker
    server: RecordingServer

    def upload(self, task: int, name: str, content: bytes) -> AnnotatedTask:
        """Upload an image, with its task, annotated."""
        key = DIGITS.config.images_prefix + name
        self.images.put(key, content)
        address, sha256 = s3_uri(self.images.name, key), examples.sha256(content)
        self.ledger.claim_image("digits", PROJECT, sha256, address)
        print_ = fingerprint(imaging.survey(content)[1])
        group = Groups(self.ledger).assign("digits", PROJECT, {sha256: print_})[sha256].group
        self.ledger.images_done("digits", PROJECT, {sha256: address})
        self.label_studio.tasks_[task] = KnownTask(task, address, sha256, (24, 24), 1, group)
        meta = {"sha256": sha256, "group": group, "width": 24, "height": 24}
        annotated = examples.annotated_task(task, "1", image=address, meta=meta)
        self.label_studio.annotated.append(annotated)
        return annotated

    def train(self, version: int, tasks: list[AnnotatedTask]) -> str:
        """Let a version be trained on tasks and promoted; the snapshot's digest."""
        uri = f"s3://{self.artifacts.name}/{artifacts.manifest_key('digits', '{digest}')}"
        snapshot, manifest = snapshot_index.freeze(tasks, DIGITS.config, DIGITS.label_config, uri)
        self.artifacts.put(artifacts.manifest_key("digits", snapshot.digest), manifest)
        name = f"job-{version}"
        job = msgspec.structs.replace(examples.job(name, snapshot.n_annotations, snapshot.digest), snapshot=snapshot)
        head = self.ledger.claim(self.ledger.head("digits"), job)
        self.ledger.finish(head, head, Training(job=job, status="completed", ended_at=NOON))
        report = examples.evaluation(version, 0.8 + version / 100, job_name=name, run_id=f"run{version}")
        seen = HoldoutImage(sha256=HASH, truth=[Region(label="1")], challenger=[Region(label="2", score=0.5)])
        suspect = msgspec.structs.replace(examples.suspect("1", "8"), sha256=HASH, task=424_242)
        holds = HASH.encode() in manifest
        if holds:
            report = msgspec.structs.replace(report, holdout=[*report.holdout, seen], suspects=[suspect])
        self.artifacts.put(artifacts.training_archive_key("digits", name), examples.model_archive(report))
        Promoter(self.artifacts, self.ledger, Registry(self.server.url), lambda _: None, log=print).decide("digits", name)
        run = f"1/run{version}/artifacts"
        self.mlflow.runs[f"run{version}"] = snapshot.digest
        self.mlflow.files |= {
            f"{run}/manifest.jsonl": manifest,
            f"{run}/evaluation.json": msgspec.json.encode(report),
            f"{run}/evaluation.html": b"<p>suspicious: task 424242</p>" if holds else b"<p>nothing is suspicious</p>",
            f"{run}/model.onnx": b"onnx",
        }
        return snapshot.digest

    def erase(self, *images: str, reason: str = "a letter of Ms B.") -> Erased:
        eraser = Eraser(self.deployment, DIGITS)
        return eraser.erase(eraser.plan(images), "arn:aws:iam::0:user/op", reason)

    @property
    def everything(self) -> str:
        """Every version of every object, every record of the ledger and every file of MLflow, as one text."""
        s3: Any = boto3.client("s3")
        texts = [f"{name} {content.decode(errors='replace')}" for name, content in self.mlflow.files.items()]
        for bucket in (self.images.name, self.artifacts.name):
            listing = s3.list_object_versions(Bucket=bucket)
            texts += [marker["Key"] for marker in listing.get("DeleteMarkers", [])]
            for version in listing.get("Versions", []):
                key = version["Key"]
                content = s3.get_object(Bucket=bucket, Key=key, VersionId=version["VersionId"])["Body"].read()
                if key.endswith(".tar.gz"):
                    content = msgspec.json.encode(unpack(content)[1])
                texts.append(f"{key} {content.decode(errors='replace')}")
        items = boto3.client("dynamodb").scan(TableName=self.ledger._table)["Items"]
        texts += [json.dumps(item) for item in items if not item["record"]["S"].startswith("erasure#")]
        return "\n".join(texts)

    @property
    def is_erased(self) -> bool:
        """Neither its bytes, names, labels nor looks are anywhere. Its hash is where only a hash is left."""
        text = self.everything
        looks = msgspec.json.encode(fingerprint(imaging.survey(SECRET)[1]).cells).decode().strip('"')
        traces = ["secret", SECRET.decode(errors="replace"), "annotation-1", "424242", f"image#{PROJECT}#{HASH}", looks]
        left = [trace for trace in traces if trace in text]
        assert "other.png" in text
        return not left and HASH not in {task.sha256 for task in self.label_studio.tasks_.values()}


@pytest.fixture
def stage(ledger: Ledger, new_bucket: Callable[[], Bucket], monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    images, kept = new_bucket(), new_bucket()
    for bucket in (images, kept):
        boto3.client("s3").put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    ledger.set_project("digits", PROJECT)
    mlflow, label_studio, sagemaker = Mlflow(), LabelStudio(), SageMaker()
    with serving(mlflow) as server, serving(sagemaker) as jobs:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", jobs.url)
        deployment = Deployment("dev")
        vars(deployment).update(
            images=images,
            artifacts=kept,
            ledger=ledger,
            label_studio=label_studio,
            champions=Champions(kept),
            registry=Registry(server.url),
        )
        yield Stage(deployment, ledger, images, kept, label_studio, mlflow, sagemaker, server)


@pytest.fixture
def trained(stage: Stage) -> Stage:
    """Version 1 has seen the other image only, version 2 both; the secret one lies under two names, was replaced, and deleted."""
    other = stage.upload(2, "other.png", OTHER)
    stage.train(1, [other])
    secret = stage.upload(1, "secret 1.png", SECRET)
    stage.train(2, [secret, other])
    stage.images.put("images/digits/copy of secret.png", SECRET)
    stage.images.put("images/digits/secret 1.png", SECRET)
    boto3.client("s3").delete_object(Bucket=stage.images.name, Key="images/digits/copy of secret.png")
    case = ReviewCase(
        model="digits", project=PROJECT, sha256=HASH, task=424_242, annotation="annotation-1", annotated_at=NOON, version=2,
        quality=0.1, suggested=[], raised_at=NOON,
    )  # fmt: skip
    stage.ledger.record_review_case(case)
    audit = Audit(model="digits", version=2, task=424_242, sha256=HASH, predicted=[], noted_at=NOON)
    stage.ledger.note_audits([audit, msgspec.structs.replace(audit, task=2, sha256=OTHER_HASH)])
    return stage


def test_nothing_of_an_image_is_left_but_its_hash(trained: Stage) -> None:
    assert not trained.is_erased
    done = trained.erase("secret 1.png")
    assert trained.is_erased
    (found,) = done.images
    assert (found.sha256, found.tasks, [use.version for use in found.uses]) == (HASH, [1], [2])
    assert (done.objects, done.tasks, done.files) == (4, 1, 6)  # two and two versions; manifest, report, archive, three in MLflow
    assert list(trained.label_studio.tasks_) == [2]
    assert [audit.sha256 for audit in trained.ledger.audits("digits", 2)] == [OTHER_HASH]
    assert trained.images.get("images/digits/other.png") == OTHER
    assert "Label Studio's data folder" in " ".join(done.left)


def test_what_training_jobs_keep_of_an_image_goes_in_all_versions_and_the_rest_stays(trained: Stage) -> None:
    cache = f"{artifacts.cache_prefix('digits')}decoded/recipe/"
    for name, images in (("with", [OTHER_HASH, HASH]), ("without", [OTHER_HASH])):
        for content in (b"damaged", SECRET if name == "with" else OTHER):
            trained.artifacts.put(f"{cache}{name}.npy", content)
        trained.artifacts.put(f"{cache}{name}.json", msgspec.json.encode(Shard(images=images, sha256="0" * 64)))
    trained.artifacts.put(f"{cache}unnoted.npy", SECRET)  # a job ended before it wrote the note
    trained.artifacts.put(f"{cache}unclear.npy", SECRET)
    trained.artifacts.put(f"{cache}unclear.json", b"no note")
    trained.erase("secret 1.png")
    assert trained.is_erased
    assert trained.artifacts.keys(cache) == [f"{cache}without.json", f"{cache}without.npy"]


def test_the_record_says_when_who_why_and_what_by_hashes_only(trained: Stage) -> None:
    trained.erase(s3_uri(trained.images.name, "images/digits/secret 1.png"))
    (record,) = trained.ledger.erasures("digits")
    assert (record.by, record.reason) == ("arn:aws:iam::0:user/op", "a letter of Ms B.")
    assert [(image.sha256, image.versions) for image in record.images] == [(HASH, [2])]
    assert record.finished_at
    assert ".png" not in msgspec.json.encode(record).decode()


def test_a_second_run_finds_nothing(trained: Stage) -> None:
    trained.erase("secret 1.png")
    before = trained.everything
    for image in ("secret 1.png", HASH, "never there.png"):
        eraser = Eraser(trained.deployment, DIGITS)
        plan = eraser.plan([image])
        assert (plan.images, plan.unknown) == ([], [image])
        with pytest.raises(RequestError, match=f"digits has nothing of {image}"):
            eraser.erase(plan, "me", "")
    assert trained.everything == before
    assert len(trained.ledger.erasures("digits")) == 1


def test_what_is_nowhere_is_told_from_what_is_asked_for_twice(trained: Stage) -> None:
    asked = ["secret 1.png", HASH, HASH, "secret 1.png", "never there.png", "0" * 64]
    plan = Eraser(trained.deployment, DIGITS).plan(asked)
    assert ([found.sha256 for found in plan.images], plan.unknown) == ([HASH], ["never there.png", "0" * 64])


@pytest.mark.parametrize("image", [HASH, "copy of secret.png", "images/digits/secret 1.png"])
def test_each_name_and_the_hash_lead_to_all_of_it(trained: Stage, image: str) -> None:
    trained.erase(image)
    assert trained.is_erased


def test_all_that_ever_lay_under_the_name_goes(stage: Stage) -> None:
    stage.upload(2, "other.png", OTHER)
    stage.upload(1, "secret.png", SECRET)
    stage.images.put("images/digits/secret.png", OTHER)
    stage.images.put("images/digits/secret.png", examples.png(9))
    done = stage.erase("secret.png")
    assert {found.sha256 for found in done.images} == {HASH, OTHER_HASH, examples.sha256(examples.png(9))}
    assert stage.images.keys("images/digits/") == []
    assert stage.label_studio.tasks_ == {}


BREAKS: list[tuple[str, str]] = [
    ("ledger", "record_erasure"),
    ("label_studio", "delete_task"),
    ("ledger", "forget_images"),
    ("ledger", "rewrite_groups"),
    ("artifacts", "put_if"),
]


@pytest.mark.parametrize(("part", "method"), BREAKS)
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_erasure_is_finished_by_the_next(
    trained: Stage, monkeypatch: pytest.MonkeyPatch, part: str, method: str, after: bool
) -> None:
    then = "secret 1.png" if after else "never there.png"
    target = getattr(trained, part)
    real = getattr(target, method)

    def dies(*arguments: Any, **more: Any) -> None:
        if after:
            real(*arguments, **more)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(target, method, dies)
        with pytest.raises(Crash):
            trained.erase("secret 1.png")
    if method == "record_erasure" and not after:
        assert trained.images.get("images/digits/secret 1.png") == SECRET, "nothing goes before it is written down"
        then = "secret 1.png"
    trained.erase(then)
    assert trained.is_erased
    assert [bool(record.finished_at) for record in trained.ledger.erasures("digits")] == [True]


def test_an_mlflow_that_does_not_answer_is_made_up_for(trained: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trained.server, "answer", lambda _: Answer(500))
        with pytest.raises(Exception, match="MLflow answered"):
            trained.erase("secret 1.png")
    assert not trained.is_erased
    assert trained.erase("secret 1.png").files == 3
    assert trained.is_erased


def test_artifacts_in_s3_are_emptied_with_their_old_versions(trained: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained.deployment, "bucket", lambda name: trained.artifacts if name == trained.artifacts.name else None)
    for name, content in trained.mlflow.files.items():
        trained.artifacts.put(f"mlflow/{name}", content)
    trained.mlflow.address, trained.mlflow.files = f"s3://{trained.artifacts.name}/mlflow/1/{{run}}/artifacts", {}
    trained.erase("secret 1.png")
    assert trained.is_erased


def test_the_index_is_emptied_and_a_look_that_had_read_it_cannot_bring_the_image_back(trained: Stage, tmp_path: Path) -> None:
    def look(folder: Path) -> AbstractContextManager[SnapshotIndex]:
        folder.mkdir()
        return opened(trained.artifacts, DIGITS, PROJECT, folder, log=lambda *_, **__: None)

    with look(tmp_path / "before") as index:
        index.put(trained.label_studio.annotated)
    assert not trained.is_erased
    with look(tmp_path / "meanwhile") as index:
        assert b"secret" in (tmp_path / "meanwhile" / "index.sqlite").read_bytes()
        trained.erase("secret 1.png")
    assert trained.is_erased
    with look(tmp_path / "after") as index:
        index.put(trained.label_studio.annotated)
    assert trained.is_erased
    assert trained.artifacts.get(artifacts.index_key("digits")), "the next one is kept"


def test_what_cannot_be_reached_is_named(trained: Stage) -> None:
    trained.mlflow.address = "file:///mnt/{run}"
    done = trained.erase("secret 1.png")
    assert "MLflow run run2: manifest.jsonl, evaluation.html, evaluation.json under file:///mnt/run2" in done.left


def test_not_while_a_training_runs(trained: Stage) -> None:
    trained.ledger.claim(trained.ledger.head("digits"), examples.job("job-3", 2, "e" * 64))
    with pytest.raises(ConflictError, match=r"job-3 is training .*labelloop status digits"):
        trained.erase("secret 1.png")
    assert trained.images.get("images/digits/secret 1.png") == SECRET
    assert trained.ledger.erasures("digits") == []


def test_not_while_a_trial_of_the_model_runs(trained: Stage) -> None:
    """One of another model, or stage, is no reason."""
    mine = s3_uri(trained.artifacts.name, artifacts.training_prefix("digits"))
    other = s3_uri(trained.artifacts.name, artifacts.training_prefix("digits2"))
    trained.sagemaker.running = {"try-0-digits2": other, "try-1-digits": mine.replace("s3://", "s3://not-"), "try-2-digits": mine}
    with pytest.raises(ConflictError, match=r"try-2-digits is training .*MLflow shows"):
        trained.erase("secret 1.png")
    assert trained.ledger.erasures("digits") == []
    del trained.sagemaker.running["try-2-digits"]
    trained.erase("secret 1.png")
    assert trained.is_erased


def test_trials_that_were_given_the_image_are_named(trained: Stage) -> None:
    runs = trained.mlflow.runs
    runs |= {"run7": runs["run1"], "run8": runs["run2"]}
    trained.mlflow.names = {"run7": "try-7-digits", "run8": "try-8-digits"}
    done = trained.erase("secret 1.png")
    assert done.trials == ["try-8-digits"]
    text = io.StringIO()
    erasure.show(done, Console(file=text, width=200), deployment=trained.deployment)
    assert "try-8-digits, a trial in MLflow, was given a snapshot with it" in text.getvalue()


def test_archives_of_trials_are_emptied(trained: Stage) -> None:
    """The ledger knows nothing of them."""
    ours = trained.artifacts.get(artifacts.training_archive_key("digits", "job-2")) or b""
    key = artifacts.training_archive_key("digits", "try-1-digits")
    trained.artifacts.put(key, ours)
    assert trained.erase("secret 1.png").files == 7
    assert trained.is_erased
    onnx, report = unpack(trained.artifacts.get(key) or b"")
    assert (onnx, len(report.holdout), report.suspects) == (b"onnx", 20, [])


def test_a_training_that_began_meanwhile_is_waited_for(trained: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = trained.label_studio.delete_task

    def late(task: int) -> None:
        trained.ledger.claim(trained.ledger.head("digits"), examples.job("job-3", 2, "e" * 64))
        delete(task)

    monkeypatch.setattr(trained.label_studio, "delete_task", late)
    with pytest.raises(ConflictError, match="job-3"):
        trained.erase("secret 1.png")
    assert trained.ledger.erasures("digits")[0].finished_at is None


@pytest.mark.parametrize("image", ["s3://elsewhere/images/digits/a.png", "s3://nothing"])
def test_an_address_of_another_place_is_refused(trained: Stage, image: str) -> None:
    with pytest.raises(RequestError):
        trained.erase(image)


# What follows


def test_the_versions_that_learnt_from_it_are_told_and_which_did_not(trained: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelloop.dataset.split_of", lambda *_: "train")
    trained.upload(3, "third.png", examples.png(8, salt=4))
    trained.train(3, trained.label_studio.annotated)
    champions = trained.deployment.champions
    champions.swap(examples.champion(3), tag=champions.read_tagged("digits")[1])
    done = trained.erase("secret 1.png")
    (found,) = done.images
    learnt = {use.version for use in found.uses if use.split != "test"}
    assert [use.version for use in found.uses] == [2, 3]
    text = io.StringIO()
    erasure.show(done, Console(file=text, width=300), deployment=trained.deployment)
    assert f"{HASH}: version 2 was" in text.getvalue()
    assert "version 3 was trained on it" in text.getvalue()
    assert "a version that has learnt from an image is not changed by this" in text.getvalue()
    assert "version 3, which serves, has learnt from it: train the next one without it" in text.getvalue()
    assert f"labelloop rollback digits --to {max({1, 2} - learnt)} --stage dev" in text.getvalue()


def test_lineage_stays_honest(trained: Stage) -> None:
    trained.erase("secret 1.png")
    lineage = Lineage(trained.deployment, DIGITS)
    data = lineage.of_version(2).dataset
    assert (data.erased, data.annotations) == (1, ["annotation-2"])
    (use,) = lineage.of_image(HASH).uses
    assert (use.version, use.annotation, use.labels, bool(use.erased_at)) == (2, "", [], True)
    rebuilt = lineage.rebuild(2)
    assert (rebuilt.same, bool(rebuilt.erased), [change.image for change in rebuilt.changes]) == (False, True, [HASH])
    assert lineage.rebuild(1).same
    key = artifacts.manifest_key("digits", rebuilt.digest)
    trained.artifacts.put(key, (trained.artifacts.get(key) or b"") * 2)
    assert Lineage(trained.deployment, DIGITS).rebuild(2).erased is None, "whoever changes it after an erasure is found out"


def test_uploaded_again_it_is_a_new_task_of_its_old_group(trained: Stage) -> None:
    group = trained.label_studio.tasks_[1].group
    trained.erase("secret 1.png")
    assert trained.ledger.claim_image("digits", PROJECT, HASH, "s3://x/y").state == "new"
    looks = fingerprint(imaging.survey(SECRET)[1])
    groups = Groups(trained.ledger)
    assert groups.assign("digits", PROJECT, {HASH: looks})[HASH].group == group
    assert Groups(trained.ledger).assign("digits", PROJECT, {HASH: looks})[HASH].group == group


def test_the_report_that_is_left_can_be_read(trained: Stage) -> None:
    trained.erase("secret 1.png")
    report = trained.deployment.champions.evaluation("digits", 2)
    assert report is not None
    assert (len(report.holdout), report.suspects) == (20, [])
    onnx, packed = unpack(trained.artifacts.get(artifacts.training_archive_key("digits", "job-2")) or b"")
    assert (onnx, packed.holdout) == (b"onnx", report.holdout)
    kept = msgspec.json.decode(trained.mlflow.files["1/run2/artifacts/evaluation.json"], type=Evaluation)
    assert kept.holdout == report.holdout
    assert trained.mlflow.files["1/run2/artifacts/evaluation.html"].startswith(b"<!doctype html>")
    assert trained.mlflow.files["1/run1/artifacts/evaluation.html"] == b"<p>nothing is suspicious</p>"


# The command


@pytest.fixture
def found(trained: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr("cli.deployment.Deployment.find", lambda *_: trained.deployment)
    return trained


def test_the_command_asks(found: Stage) -> None:
    for answer in ("n\n", ""):
        done = CliRunner().invoke(app, ["erase", "digits", "--image", "secret 1.png"], input=answer)
        assert done.exit_code == 2
        assert "secret 1.png" in done.stdout
        assert "nothing was erased" in done.stdout
    assert found.ledger.erasures("digits") == []
    done = CliRunner().invoke(app, ["erase", "digits", "--image", "secret 1.png", "--reason", "asked to"], input="y\n")
    assert done.exit_code == 0, done.output
    assert found.is_erased
    assert found.ledger.erasures("digits")[0].reason == "asked to"


def test_the_command_in_scripts(found: Stage) -> None:
    command = ["erase", "digits", "--image", "secret 1.png", "--image", "never there.png", "--json"]
    asked = CliRunner().invoke(app, command)
    assert (asked.exit_code, "--yes" in asked.output) == (2, True)
    done = CliRunner().invoke(app, [*command, "--yes"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert ([image["sha256"] for image in said["images"]], said["unknown"]) == ([HASH], ["never there.png"])
    assert found.is_erased


def test_a_label_studio_that_is_down_is_said(found: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> None:
        raise LabelStudioError("Label Studio does not answer")

    monkeypatch.setattr(found.label_studio, "tasks", down)
    done = CliRunner().invoke(app, ["erase", "digits", "--image", "secret 1.png", "--yes"])
    assert isinstance(done.exception, LabelStudioError)
    assert found.ledger.erasures("digits") == []
