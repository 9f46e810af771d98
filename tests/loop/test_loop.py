"""The whole loop for real: Label Studio, MLflow, the deployed stacks, training processes. Tests run in the file's order."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import boto3
import msgspec
import psutil
import urllib3
from typer.testing import CliRunner

from cli.demo import ask_about_holdout, groups_of
from cli.main import app
from cli.status import read_status
from labelloop import artifacts, problem_types
from labelloop.dataset import split_of
from labelloop.records import ManifestRow, Promotion, Region
from tests.laptop import FIRST, Loop, wait_for, wait_until_idle


def test_every_image_became_one_task(loop: Loop) -> None:
    images = [task.image for task in loop.deployment.label_studio.tasks(loop.project, "image")]
    assert sorted(images) == sorted(loop.address(digit) for digit in loop.data)
    assert loop.deployment.label_studio.counts(loop.project)["tasks"] == len(loop.data)


def test_before_its_first_version_a_model_says_so(loop: Loop) -> None:
    access = loop.deployment.backend("numerals")
    headers = {"Authorization": access.authorization}
    setup = loop.http.request("POST", f"{access.url}/setup", json={}, headers=headers)
    assert setup.json() == {"model_version": "numerals v0"}
    tasks = [{"id": 1, "data": {"image": loop.address(loop.data[0])}}]
    answer = loop.http.request("POST", f"{access.url}/predict", json={"tasks": tasks}, headers=headers)
    assert answer.json()["results"] == [{"error": "no model has been trained yet"}]


def test_a_second_delivery_of_an_event_makes_no_second_task(loop: Loop) -> None:
    digit = loop.data[0]
    before = loop.deployment.label_studio.counts(loop.project)["tasks"]
    loop.deployment.images.put(loop.folder.config.images_prefix + digit.name, digit.image)
    loop.deployment.images.put(loop.folder.config.images_prefix + "a copy of it.png", digit.image)
    loop.deployment.images.put(loop.folder.config.images_prefix + "broken.png", digit.image[:40])
    wait_until_idle(loop, "IngestQueue")
    assert loop.deployment.label_studio.counts(loop.project)["tasks"] == before


def test_the_front_door_lets_nobody_in_without_the_models_own_credentials(loop: Loop) -> None:
    own, other = loop.backend, loop.deployment.backend("numerals")
    wrong = urllib3.make_headers(basic_auth=f"{own.user}:wrong")["authorization"]
    asked = [*loop.deployment.ledger._query(loop.model, "answer#")]
    for route, body in (("webhook", {"action": "START_TRAINING"}), ("predict", {"tasks": []}), ("setup", {})):
        for authorization, status in ((None, 401), (wrong, 403), (other.authorization, 403)):
            headers = {"Authorization": authorization} if authorization else {}
            answer = loop.http.request("POST", f"{own.url}/{route}", json=body, headers=headers)
            assert answer.status == status, (route, authorization, answer.data)
    wait_until_idle(loop, "RetrainQueue")  # the schedule's messages are in it, too
    assert [*loop.deployment.ledger._query(loop.model, "answer#")] == asked, "nobody has pressed the button"
    assert loop.http.request("POST", f"{other.url}/setup", json={}, headers={"Authorization": other.authorization}).status == 200


def test_annotations_become_a_version_that_serves(loop: Loop, first_version: Promotion) -> None:
    assert (first_version.version, first_version.verdict) == (1, "promote")
    champion = loop.deployment.champions.read(loop.model)
    assert champion is not None
    assert champion.version == 1
    _wait_for_title(loop, "digits v1")
    assert ask_about_holdout(loop.deployment, loop.folder, loop.data).value > 0.75  # 60 annotations; chance is 0.1


def test_the_registry_has_the_version_with_its_tags(loop: Loop, first_version: Promotion) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(loop.deployment.mlflow_tracking_uri)
    version = client.get_model_version_by_alias("digits", "champion")
    training = loop.deployment.ledger.trainings(loop.model)[0]
    assert version.version in (1, "1")
    assert version.tags["n_annotations"] == str(FIRST)
    assert version.tags["dataset_digest"] == training.job.digest
    assert float(version.tags["accuracy"]) == first_version.value
    assert version.tags["verdict"] == "promote"
    names = {artifact.path for artifact in client.list_artifacts(str(version.run_id))}
    assert {"model.onnx", "evaluation.json"} <= names


def test_the_holdout_is_never_trained_on(loop: Loop, first_version: Promotion) -> None:
    """What the job trained on (by its own report) and what the demo measures on have no image in common."""
    training = loop.deployment.ledger.trainings(loop.model)[0]
    manifest = loop.deployment.artifacts.get(artifacts.manifest_key(loop.model, training.job.digest))
    assert manifest is not None
    rows = [msgspec.json.decode(line, type=ManifestRow) for line in manifest.splitlines()]
    groups = groups_of(loop.deployment, loop.folder)
    holdout = {digit.sha256 for digit in loop.data if split_of(groups[digit.sha256], loop.folder.config.splits) == "test"}
    trained = {row.sha256 for row in rows if row.split != "test"}
    assert len(rows) == FIRST
    assert holdout
    assert not trained & holdout
    report = loop.deployment.champions.evaluation(loop.model, first_version.version)
    assert report is not None
    assert {image.sha256 for image in report.holdout} == {row.sha256 for row in rows if row.split == "test"} <= holdout
    assert report.n_train + report.n_validation == len(trained)


def test_label_studio_stores_predictions_of_the_version_once(loop: Loop, first_version: Promotion) -> None:
    """Opening a task asks for its prediction; opening it again does not double it."""
    loop.wait_until_predicted(1)
    _, task = loop.annotator.tasks[-3]
    for _ in range(2):
        predictions = _open_task(loop, task)["predictions"]
    assert [prediction["model_version"] for prediction in predictions] == ["digits v1"]
    assert 0 < float(str(predictions[0]["score"])) <= 1


def test_fifty_webhooks_at_once_start_one_job(loop: Loop, first_version: Promotion) -> None:
    before = loop.job_names()
    annotated = loop.annotate_more(5)
    wait_until_idle(loop, "RetrainQueue")
    assert loop.job_names() == before  # not due by itself
    with ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(lambda _: loop.webhook("START_TRAINING"), range(50)))
    assert statuses == [201] * 50
    loop.verdict_about(annotated)
    wait_until_idle(loop, "RetrainQueue")
    assert len(loop.job_names()) == len(before) + 1


def test_start_training_without_anything_new_starts_nothing(loop: Loop, first_version: Promotion) -> None:
    before = loop.job_names()
    assert loop.webhook("START_TRAINING") == 201
    wait_until_idle(loop, "RetrainQueue")
    assert loop.job_names() == before


def test_label_studios_own_button_trains_at_once(loop: Loop, first_version: Promotion) -> None:
    annotated = loop.annotate_more(1)
    (backend,) = loop.deployment.label_studio.backends(loop.project)
    answer = loop.http.request(
        "POST",
        f"{loop.deployment.label_studio_url}/api/ml/{backend['id']}/train",
        json={"use_ground_truth": False},
        headers={"Authorization": f"Token {loop.deployment.label_studio_token}"},
    )
    assert answer.status == 200, answer.data
    assert loop.verdict_about(annotated).n_annotations == annotated


def test_a_failing_training_is_seen_and_the_next_snapshot_trains(loop: Loop, first_version: Promotion) -> None:
    """An image that is gone, and that no job has decoded yet, makes one fail; once it is back, the next snapshot trains."""
    before = {task.id for task in loop.listed() if task.labelled}
    annotated = loop.annotate_more(1)
    (address,) = (task.image for task in loop.listed() if task.labelled and task.id not in before)
    _, key = artifacts.parse_s3_uri(address)
    content = loop.deployment.images.get(key)
    assert content is not None
    boto3.client("s3").delete_object(Bucket=loop.deployment.images.name, Key=key)
    loop.webhook("START_TRAINING")
    failed = wait_for(lambda: loop.deployment.ledger.head(loop.model).failure, 120, "the failure is noted")
    assert failed.n_annotations == annotated
    assert key.rpartition("/")[2] in failed.reason

    shown = CliRunner().invoke(app, ["status", "digits", "--home", str(loop.stack.home), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["failures"][-1]["reason"] == failed.reason

    loop.deployment.images.put(key, content)
    annotated = loop.annotate_more(1)
    loop.webhook("START_TRAINING")
    loop.verdict_about(annotated)
    assert loop.deployment.ledger.head(loop.model).failure is None


def test_a_stopped_training_service_leaves_the_ledger_able_to_train(loop: Loop, first_version: Promotion) -> None:
    """The stand-in dies in mid-training and comes back: the job has failed, and the next snapshot trains."""
    annotated = loop.annotate_more(1)
    before = loop.job_names()
    loop.webhook("START_TRAINING")
    wait_for(lambda: loop.job_names() != before, 60, "the job starts")
    job = wait_for(lambda: loop.deployment.ledger.head(loop.model).running, 60, "the job runs")
    assert job.n_annotations == annotated
    wait_for(lambda: loop.stack.job_log(job.job_name).exists(), 60, "the job's process writes")
    service = psutil.Process(loop.stack.pids()["sagemaker"])
    service.kill()
    service.wait(30)
    loop.stack.up()
    failure = wait_for(lambda: loop.deployment.ledger.head(loop.model).failure, 120, "the failure is noted")
    assert failure.job_name == job.job_name
    annotated = loop.annotate_more(1)
    loop.webhook("START_TRAINING")
    loop.verdict_about(annotated)


def test_a_lost_promotion_event_heals_by_itself(loop: Loop, first_version: Promotion) -> None:
    """A verdict that was never reached (here: deleted) is asked for again by the next look, and no training starts meanwhile."""
    before = loop.job_names()
    trained = loop.deployment.ledger.head(loop.model).trained
    assert trained is not None
    for record in ("promotion", "recall"):  # with the note that the verdict was asked for again, if it ever was
        boto3.client("dynamodb").delete_item(
            TableName=loop.deployment.outputs["LedgerTable"],
            Key={"model": {"S": loop.model}, "record": {"S": f"{record}#{trained.job_name}"}},
        )

    def judged_again() -> Promotion | None:
        loop.webhook("ANNOTATION_UPDATED")  # `retrain` gives the event of the job's end half a minute
        return loop.deployment.ledger.promotion(loop.model, trained.job_name)

    wait_for(judged_again, 90, "the verdict")
    assert loop.job_names() == before


def test_status_tells_what_a_person_asks(loop: Loop, first_version: Promotion) -> None:
    status = read_status(loop.deployment, loop.folder)
    assert status.annotations == loop.annotated
    assert status.problems == []
    assert status.next_training is not None
    assert status.next_training.due_at > status.annotations
    assert [version.version for version in status.versions] == list(range(1, len(status.versions) + 1))
    assert sum(version.champion for version in status.versions) == 1
    shown = CliRunner().invoke(app, ["status", "digits", "--home", str(loop.stack.home)])
    assert shown.exit_code == 0, shown.output
    assert "next training" in shown.stdout


def test_setting_the_project_up_again_changes_nothing(loop: Loop) -> None:
    from cli.label_studio_project import set_up_project

    assert set_up_project(loop.deployment, loop.folder).changes == []


def test_an_unknown_class_is_left_out_and_counted(loop: Loop, first_version: Promotion) -> None:
    """Label Studio stores any label unchecked; the snapshot leaves out what config.yaml does not name."""
    _, task = loop.annotator.tasks[-2]
    eleven = problem_types.of("classification").result([Region(label="eleven")], loop.folder.label_config, (8, 8))
    loop.deployment.label_studio.annotate(task, eleven, seconds=1)
    loop.annotate_more(1)  # without anything new to learn there is no new snapshot
    loop.webhook("START_TRAINING")
    reason = "the class 'eleven' is not in config.yaml"
    wait_for(lambda: read_status(loop.deployment, loop.folder).left_out.get(reason) == 1, 120, "the status names the class")
    wait_until_idle(loop, "RetrainQueue")
    head = loop.deployment.ledger.head(loop.model)
    newest = head.running.snapshot if head.running else loop.deployment.ledger.trainings(loop.model)[-1].job.snapshot
    if head.running:
        loop.verdict_about(newest.n_annotations)
    assert newest.n_annotations < loop.annotated


def test_nothing_of_the_stack_listens_beyond_this_machine(loop: Loop) -> None:
    for process in map(psutil.Process, loop.stack.pids().values()):
        for one in [process, *process.children(recursive=True)]:
            for connection in one.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip == "127.0.0.1", (one.cmdline(), connection)


def _open_task(loop: Loop, task: int) -> dict[str, list[dict[str, object]]]:
    answer = loop.http.request(
        "GET",
        f"{loop.deployment.label_studio_url}/api/tasks/{task}?project={loop.project}",
        headers={"Authorization": f"Token {loop.deployment.label_studio_token}"},
    )
    assert answer.status == 200, answer.data
    return answer.json()  # type: ignore[no-any-return]


def _wait_for_title(loop: Loop, title: str) -> None:
    label_studio = loop.deployment.label_studio
    wait_for(lambda: label_studio.model_version(loop.project) == title, 60, f"the title {title}")
