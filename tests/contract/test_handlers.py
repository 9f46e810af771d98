"""The other functions as Lambda calls them: partial batch failures, policies, and what happens to a message that is none."""

from __future__ import annotations

import ast
import json
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from labelloop import artifacts
from labelloop.acceptance import Acceptance
from labelloop.artifacts import Bucket, Champions
from labelloop.errors import ConflictError, LabelStudioError, LateError, NotSetUpError, UnknownModelError
from labelloop.ledger import Ledger
from labelloop.prelabel import Prelabelled
from labelloop.records import Drift
from labelloop.retrain import Outcome
from tests import examples
from tests.examples import LambdaContext, basic, sqs_event
from tests.recording_server import Answer, RecordingServer, Request, serving


def at_once(_event: Any, failed: set[str], unreadable: set[str]) -> dict[str, Any]:
    """`Redelivery` without a queue."""
    assert not failed & unreadable
    return {"batchItemFailures": [{"itemIdentifier": message} for message in sorted(failed | unreadable)]}


def failures(answer: Any) -> list[str]:
    assert answer.keys() == {"batchItemFailures"}
    return [entry["itemIdentifier"] for entry in answer["batchItemFailures"]]


@pytest.mark.parametrize("file", sorted(examples.REPOSITORY.glob("functions/*/handler.py")), ids=lambda file: file.parent.name)
def test_no_log_field_takes_the_place_of_what_every_line_has(file: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    logs = [call for call in calls if ast.unparse(call.func).startswith("log.") and call.keywords]
    assert logs
    assert not {keyword.arg for call in logs for keyword in call.keywords} & {"level", "message", "timestamp", "service"}


# retrain


class Reconciler:
    """Writes down what it is asked; fails for the models that it is told to."""

    def __init__(self, **errors: Exception) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.answered: list[tuple[str, str, str]] = []
        self._errors = errors
        self.outcome = Outcome(None, "nothing to do")

    def has_answered(self, model: str, request: str) -> bool:
        return request in [answered for by, answered, _ in self.answered if by == model]

    def answer(self, model: str, request: str, outcome: Outcome) -> None:
        self.answered.append((model, request, outcome.reason))

    def reconcile(self, model: str, *, asked: bool = False) -> Outcome:
        self.asked.append((model, asked))
        if model in self._errors:
            raise self._errors[model]
        return self.outcome


def retrain(
    monkeypatch: pytest.MonkeyPatch, reconciler: Reconciler, *bodies: Any, watchdog: Callable[[str], str | None] = lambda _: None
) -> list[str]:
    handler = examples.load_handler("retrain")
    monkeypatch.setattr(handler, "reconciler", lambda: reconciler)
    monkeypatch.setattr(handler, "watchdog", lambda: watchdog)
    monkeypatch.setattr(handler, "redelivery", at_once)
    return failures(handler.handler(sqs_event(*bodies), LambdaContext()))


def signal(model: str, action: str = "ANNOTATION_CREATED") -> dict[str, str]:
    return {"model": model, "action": action}


def test_many_signals_of_a_model_are_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler()
    assert retrain(monkeypatch, reconciler, *[signal("digits")] * 5, signal("faces")) == []
    assert reconciler.asked == [("digits", False), ("faces", False)]


def test_one_press_of_the_button_among_many_signals_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler()
    retrain(monkeypatch, reconciler, signal("digits"), signal("digits", "START_TRAINING"), signal("digits"), signal("faces"))
    assert reconciler.asked == [("digits", True), ("faces", False)]


def test_start_training_that_is_delivered_again_is_not_pressed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be remembered while the training that it started runs, and start another one after it."""
    reconciler = Reconciler()
    for _ in range(2):
        assert retrain(monkeypatch, reconciler, signal("digits", "START_TRAINING")) == []
    assert reconciler.asked == [("digits", True), ("digits", False)]
    assert [request for _, request, _ in reconciler.answered] == ["m0"]
    broken = Reconciler(digits=LabelStudioError("it is away"))
    for _ in range(2):
        assert retrain(monkeypatch, broken, signal("digits", "START_TRAINING")) == ["m0"]
    assert broken.asked == [("digits", True)] * 2, "what failed was not done"


def test_each_request_is_answered_and_what_failed_is_not_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler(faces=LabelStudioError("down"))
    asked = [{**signal(model, "START_TRAINING"), "request": request} for model, request in (("digits", "a"), ("digits", "b"))]
    failed = {**signal("faces", "START_TRAINING"), "request": "c"}
    assert retrain(monkeypatch, reconciler, *asked, signal("digits"), failed) == ["m3"]
    assert sorted(reconciler.answered) == [("digits", "a", "nothing to do"), ("digits", "b", "nothing to do")]


def test_the_schedule_looks_at_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler()
    assert retrain(monkeypatch, reconciler, {"action": "SCHEDULE"}) == []
    assert [model for model, _ in reconciler.asked] == examples.CONFIGS.names


def test_the_schedule_and_nothing_else_looks_at_the_webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[str] = []

    def watchdog(model: str) -> None:
        watched.append(model)
        raise LabelStudioError("it does not answer")

    assert retrain(monkeypatch, Reconciler(), signal("digits"), watchdog=watchdog) == []
    assert watched == []
    assert retrain(monkeypatch, Reconciler(), {"action": "SCHEDULE"}, watchdog=watchdog) == [], "the next schedule looks again"
    assert watched == examples.CONFIGS.names


def test_only_the_messages_of_the_model_that_failed_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler(faces=LabelStudioError("down"))
    assert retrain(monkeypatch, reconciler, signal("digits"), signal("faces"), signal("faces")) == ["m1", "m2"]
    assert len(reconciler.asked) == 2


def test_a_reading_that_goes_on_later_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reconciler = Reconciler(digits=LateError("400,000 of 500,000 annotated tasks read, the next look goes on"))
    assert retrain(monkeypatch, reconciler, signal("digits")) == ["m0"]
    assert [json.loads(line)["level"] for line in capsys.readouterr().out.splitlines()] == ["INFO"]


def test_an_error_that_nobody_foresaw_takes_no_other_models_messages_along(monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler(digits=ZeroDivisionError())
    assert retrain(monkeypatch, reconciler, signal("digits"), signal("faces")) == ["m0"]
    assert [model for model, _ in reconciler.asked] == ["digits", "faces"]


@pytest.mark.parametrize(
    "body",
    ["no json", "[]", "{}", '{"action": null}', '{"model": 3, "action": "x"}', "", "\ud800", "[" * 100_000],
    ids=lambda body: ascii(body)[:30],
)
def test_a_message_that_is_no_signal_fails_alone(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    reconciler = Reconciler()
    assert retrain(monkeypatch, reconciler, body, signal("digits")) == ["m0"]
    assert reconciler.asked == [("digits", False)]


def test_a_model_that_there_is_not_is_said_and_does_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retrain(monkeypatch, Reconciler(digits=UnknownModelError("no model")), signal("digits"), signal("faces")) == []


def test_a_fault_of_ours_with_one_model_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = Reconciler(digits=RuntimeError("a bug"))
    assert retrain(monkeypatch, reconciler, signal("digits"), signal("faces"), signal("digits")) == ["m0", "m2"]
    assert [model for model, _ in reconciler.asked] == ["digits", "faces"]


def metrics(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What was written for CloudWatch to count, in the namespace of the stage, by service and model."""
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"_aws"' in line]
    for line in lines:
        (found,) = line["_aws"]["CloudWatchMetrics"]
        assert (found["Namespace"], [set(names) for names in found["Dimensions"]]) == ("labelloop-test", [{"service", "model"}])
    return lines


def test_what_a_look_finds_is_counted_and_an_idle_schedule_counts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "labelloop-test")
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "retrain")
    monkeypatch.setattr("labelloop.model_config.ModelConfigs.names", ["digits"])
    reconciler = Reconciler()
    reconciler.outcome = Outcome("job-1", "due", annotated=100, acceptance=Acceptance(shown=8, kept=0))
    retrain(monkeypatch, reconciler, signal("digits"), {"action": "SCHEDULE"})
    counted = {name: line[name] for line in metrics(capsys) for name in line if name[0].isupper()}
    assert counted == {"TrainingsStarted": [1], "PredictionsShown": [8], "PredictionsKept": [0], "Annotations": [100]}
    reconciler.outcome = Outcome(None, "nothing to do", annotated=100)
    retrain(monkeypatch, reconciler, {"action": "SCHEDULE"})
    assert metrics(capsys) == []


def test_a_model_that_is_not_set_up_yet_fills_no_dead_letter_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule asks about all models, also those that nobody has set up; the next one asks again."""
    assert retrain(monkeypatch, Reconciler(digits=NotSetUpError("not yet")), {"action": "SCHEDULE"}) == []


def test_the_reconciler_is_wired_from_the_environment(aws: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = boto3.client("sqs").create_queue(QueueName=f"promote-{uuid.uuid4().hex}")["QueueUrl"]
    secret = f"labelloop/test/{uuid.uuid4().hex}"
    boto3.client("secretsmanager").create_secret(Name=secret, SecretString=json.dumps({"token": "0123456789abcdef"}))
    for name, value in {
        "STAGE": "test",
        "ARTIFACTS_BUCKET": "artifacts",
        "IMAGES_BUCKET": "images",
        "LEDGER_TABLE": ledger._table,
        "LABEL_STUDIO_URL": "http://127.0.0.1:9",
        "LABEL_STUDIO_SECRET": secret,
        "PROMOTE_QUEUE": queue,
    }.items():
        monkeypatch.setenv(f"LABELLOOP_{name}", value)
    handler = examples.load_handler("retrain")
    assert failures(handler.handler(sqs_event(signal("digits")), LambdaContext())) == [], "not set up"
    handler.reconciler()._recall_promotion("digits", "job-1")
    [message] = boto3.client("sqs").receive_message(QueueUrl=queue)["Messages"]
    assert json.loads(str(message.get("Body"))) == {"model": "digits", "job_name": "job-1"}


def test_a_missing_setting_brings_the_messages_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABELLOOP_STAGE", raising=False)
    handler = examples.load_handler("retrain")
    assert failures(handler.handler(sqs_event(signal("digits")), LambdaContext())) == ["m0"]


# ingest


@pytest.fixture
def label_studio(aws: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingServer]:
    """A Label Studio whose token lies in the stage's secret."""
    secret = f"labelloop/test/{uuid.uuid4().hex}"
    boto3.client("secretsmanager").create_secret(Name=secret, SecretString=json.dumps({"token": "0123456789abcdef"}))
    with serving() as server:
        monkeypatch.setenv("LABELLOOP_LABEL_STUDIO_URL", server.url)
        monkeypatch.setenv("LABELLOOP_LABEL_STUDIO_SECRET", secret)
        yield server


def test_ingest_reports_only_what_shall_come_again(
    bucket: Bucket, ledger: Ledger, label_studio: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABELLOOP_IMAGES_BUCKET", bucket.name)
    monkeypatch.setenv("LABELLOOP_ARTIFACTS_BUCKET", bucket.name)
    monkeypatch.setenv("LABELLOOP_LEDGER_TABLE", ledger._table)
    monkeypatch.setenv("LABELLOOP_PRELABEL_QUEUE", "http://127.0.0.1:9/queue")
    ledger.set_project("digits", 3)
    bucket.put("images/digits/good.png", examples.png(1))
    bucket.put("images/digits/broken.png", examples.png(2)[:40])

    def imports(request: Request) -> Answer:
        return Answer(201, {"task_ids": list(range(len(request.json))), "prediction_count": len(request.json)})

    label_studio.answer = imports
    handler = examples.load_handler("ingest")

    def deliver(*names: str) -> list[str]:
        events = [{"detail": {"object": {"key": f"images/digits/{name}"}}} for name in names]
        return failures(handler.handler(sqs_event(*events), LambdaContext()))

    assert failures(handler.handler(sqs_event("no json"), LambdaContext())) == ["m0"]
    assert deliver("good.png", "broken.png", "gone.png") == []
    assert label_studio.paths == ["POST /api/projects/3/import?return_task_ids=true"]
    assert [task["data"]["image"] for task in label_studio.requests[0].json] == [f"s3://{bucket.name}/images/digits/good.png"]

    bucket.put("images/digits/late.png", examples.png(3))
    label_studio.answer = lambda _: Answer(500)
    assert deliver("good.png", "late.png") == ["m1"]


@pytest.mark.parametrize("secret", ['{"token": ""}', "{}", "no json", "[]"])
def test_a_secret_without_a_token_is_an_error_that_names_it(
    label_studio: RecordingServer, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    from labelloop.label_studio.client import connect
    from labelloop.settings import Settings

    name = f"labelloop/test/{uuid.uuid4().hex}"
    boto3.client("secretsmanager").create_secret(Name=name, SecretString=secret)
    monkeypatch.setenv("LABELLOOP_LABEL_STUDIO_SECRET", name)
    with pytest.raises(LabelStudioError, match=name):
        connect(Settings())
    monkeypatch.setenv("LABELLOOP_LABEL_STUDIO_SECRET", name + "-missing")
    with pytest.raises(LabelStudioError, match="missing"):
        connect(Settings())


# authorize


@pytest.fixture
def authorize(aws: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], dict[str, Any]]:
    prefix = f"labelloop/{uuid.uuid4().hex}/backend/"
    secrets: Any = boto3.client("secretsmanager")
    for model in ("digits", "faces"):
        secrets.create_secret(Name=prefix + model, SecretString=json.dumps({"username": model, "password": f"{model}-password"}))
    monkeypatch.setenv("LABELLOOP_BACKEND_SECRET_PREFIX", prefix)
    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "labelloop-test")
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "authorize")
    handler = examples.load_handler("authorize")
    arn = "arn:aws:execute-api:us-east-1:000000000000:abc123/v1/POST/digits/predict"

    def ask(headers: dict[str, str]) -> dict[str, Any]:
        answer: dict[str, Any] = handler.handler({"type": "REQUEST", "methodArn": arn, "headers": headers}, LambdaContext())
        return answer

    return ask


@pytest.mark.parametrize("header", ["Authorization", "authorization", "AUTHORIZATION"])
def test_the_models_own_secret_opens_its_path(authorize: Callable[[dict[str, str]], dict[str, Any]], header: str) -> None:
    policy = authorize({"Host": "api", header: basic("digits", "digits-password")})
    assert policy["policyDocument"]["Statement"] == [
        {
            "Action": "execute-api:Invoke",
            "Effect": "Allow",
            "Resource": "arn:aws:execute-api:us-east-1:000000000000:abc123/v1/*/digits/*",
        }
    ]


@pytest.mark.parametrize(
    ("user", "password"),
    [("digits", "faces-password"), ("faces", "digits-password"), ("digits", ""), ("unknown", "digits-password")],
)
def test_wrong_credentials_are_denied(authorize: Callable[[dict[str, str]], dict[str, Any]], user: str, password: str) -> None:
    statement = authorize({"Authorization": basic(user, password)})["policyDocument"]["Statement"][0]
    assert statement["Effect"] == "Deny"


def test_another_models_credentials_open_only_its_own_path(authorize: Callable[[dict[str, str]], dict[str, Any]]) -> None:
    """The policy is kept for an hour for every path, so it is API Gateway that answers 403 here."""
    statement = authorize({"Authorization": basic("faces", "faces-password")})["policyDocument"]["Statement"][0]
    assert statement["Effect"] == "Allow"
    assert statement["Resource"].endswith("/v1/*/faces/*")


@pytest.mark.parametrize("headers", [{}, {"Authorization": ""}, {"Authorization": "Bearer x"}, {"Authorization": "Basic é"}])
def test_without_credentials_the_answer_is_the_word_that_means_401(
    authorize: Callable[[dict[str, str]], dict[str, Any]], headers: dict[str, str]
) -> None:
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        authorize(headers)


def test_failed_sign_ins_are_counted_and_no_password_is_written_down(
    authorize: Callable[[dict[str, str]], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def failures() -> list[float]:
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert not [line for line in lines if "password" in str(line)]
        found = [line for line in lines if "_aws" in line]
        for line in found:
            (metrics,) = line["_aws"]["CloudWatchMetrics"]
            assert (metrics["Namespace"], metrics["Dimensions"]) == ("labelloop-test", [["service"]])
            assert line["service"] == "authorize"
        return [value for line in found for value in line["FailedSignIns"]]

    authorize({"Authorization": basic("digits", "digits-password")})
    assert failures() == []
    authorize({"Authorization": basic("digits", "faces-password")})
    authorize({"Authorization": basic("unknown", "digits-password")})
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        authorize({"Authorization": "Bearer x"})
    assert failures() == [1.0, 1.0, 1.0]


def test_an_event_without_headers_is_one_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "labelloop-test")
    monkeypatch.setenv("LABELLOOP_BACKEND_SECRET_PREFIX", "labelloop/test/")
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        examples.load_handler("authorize").handler({"headers": None, "methodArn": "arn:a/v1/GET/x"}, LambdaContext())


# promote, refresh


def test_promote_decides_tells_mlflow_and_announces(
    bucket: Bucket, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bus, queue = heard_bus()
    with serving() as mlflow:
        for name, value in {
            "ARTIFACTS_BUCKET": bucket.name,
            "LEDGER_TABLE": ledger._table,
            "MLFLOW_TRACKING_URI": mlflow.url,
            "EVENT_BUS": bus,
        }.items():
            monkeypatch.setenv(f"LABELLOOP_{name}", value)
        monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "labelloop-test")
        monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "promote")
        report = examples.evaluation(1, 0.9, job_name="job-1")
        bucket.put(artifacts.training_archive_key("digits", "job-1"), examples.model_archive(report))
        handler = examples.load_handler("promote")
        messages = [
            {"model": "digits", "job_name": "job-1"},
            {"model": "digits", "job_name": "failed-job"},
            "no json",
            {"model": "x"},
        ]
        assert failures(handler.handler(sqs_event(*messages), LambdaContext())) == ["m2", "m3"]
        (counted,) = metrics(capsys)
        assert (counted["accuracy"], counted["version"]) == ([0.9], 1)
        assert (counted["service"], counted["model"]) == ("promote", "digits")
        assert failures(handler.handler(sqs_event(messages[0]), LambdaContext())) == []
        assert metrics(capsys) == [], "of a decision that comes again nothing is counted again"
        champion = Champions(bucket).read("digits")
        assert champion is not None
        assert champion.version == 1
        assert mlflow.requests
        event = heard(queue)
        assert (event["source"], event["detail-type"]) == ("labelloop", "ModelPromoted")
        assert (event["detail"]["model"], event["detail"]["version"]) == ("digits", 1)

        mlflow.answer = lambda _: Answer(500)
        assert failures(handler.handler(sqs_event(messages[0]), LambdaContext())) == ["m0"], "it comes again until MLflow knows"


def heard_bus() -> tuple[str, str]:
    """An event bus and a queue that hears all of it."""
    name = f"test-{uuid.uuid4().hex}"
    events, sqs = boto3.client("events"), boto3.client("sqs")
    queue = sqs.create_queue(QueueName=name)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    events.create_event_bus(Name=name)
    events.put_rule(Name=name, EventBusName=name, EventPattern=json.dumps({"source": ["labelloop"]}))
    events.put_targets(Rule=name, EventBusName=name, Targets=[{"Id": "queue", "Arn": arn}])
    return name, queue


def heard(queue: str) -> Any:
    [message] = boto3.client("sqs").receive_message(QueueUrl=queue, WaitTimeSeconds=10)["Messages"]
    return json.loads(str(message.get("Body")))


def test_a_promotion_that_lost_a_race_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Promoter:
        def decide(self, model: str, job_name: str) -> None:
            if job_name == "loser":
                raise ConflictError("somebody else was first")

    handler = examples.load_handler("promote")
    monkeypatch.setattr(handler, "promoter", Promoter)
    messages = [{"model": "digits", "job_name": name} for name in ("winner", "loser")]
    assert failures(handler.handler(sqs_event(*messages), LambdaContext())) == ["m1"]


@pytest.mark.parametrize(
    ("function", "worker", "message"),
    [
        ("promote", "promoter", {"job_name": "job-1"}),
        ("refresh", "refresher", {"version": 1}),
        ("prelabel", "prelabeller", {"after": 0, "upto": 9}),
    ],
)
def test_what_nobody_foresaw_is_in_the_log_and_brings_only_its_own_message_again(
    function: str, worker: str, message: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Worker:
        def decide(self, model: str, _: str) -> None:
            self(SimpleNamespace(model=model))

        def __call__(self, message: Any) -> Prelabelled:
            if message.model == "broken":
                raise ZeroDivisionError("nobody foresaw it")
            if message.model == "removed":
                raise UnknownModelError("there is no model 'removed'")
            return Prelabelled()

    handler = examples.load_handler(function)
    given: list[tuple[set[str], ...]] = []

    def redelivery(event: Any, *messages: set[str]) -> dict[str, Any]:
        given.append(messages)
        return at_once(event, *messages)

    monkeypatch.setattr(handler, worker, Worker)
    monkeypatch.setattr(handler, "redelivery", redelivery)
    broken, removed, digits = ({"model": model, **message} for model in ("broken", "removed", "digits"))
    assert failures(handler.handler(sqs_event(digits, broken, "no json", removed, digits), LambdaContext())) == ["m1", "m2"]
    assert given == [({"m1"}, {"m2"})]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    errors = [line for line in lines if line.get("level") == "ERROR"]
    assert [line["model"] for line in lines if line.get("message") == "refused"] == ["removed"]
    assert [(line["message"], line["model"], line["message_id"]) for line in errors] == [
        ("failed", "broken", "m1"),
        ("failed", None, "m2"),
    ]
    assert "ZeroDivisionError: nobody foresaw it" in errors[0]["exception"]
    assert "Traceback" in errors[0]["exception"]
    assert "DecodeError" in errors[1]["exception"]


@pytest.fixture
def prelabel_queue(aws: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty queue that the environment names."""
    url = str(boto3.client("sqs").create_queue(QueueName=f"prelabel-{uuid.uuid4().hex}")["QueueUrl"])
    monkeypatch.setenv("LABELLOOP_PRELABEL_QUEUE", url)
    return url


def test_refresh_renames_the_backend_to_what_serves_now(
    bucket: Bucket, ledger: Ledger, label_studio: RecordingServer, prelabel_queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelloop.review.offer", lambda *_: 0)
    monkeypatch.setenv("LABELLOOP_ARTIFACTS_BUCKET", bucket.name)
    monkeypatch.setenv("LABELLOOP_LEDGER_TABLE", ledger._table)
    prefix = f"labelloop/test/{uuid.uuid4().hex}/"
    boto3.client("secretsmanager").create_secret(
        Name=f"{prefix}digits", SecretString=json.dumps({"username": "digits", "password": "its own"})
    )
    monkeypatch.setenv("LABELLOOP_BACKEND_SECRET_PREFIX", prefix)
    ledger.set_project("digits", 3)
    Champions(bucket).swap(examples.champion(5), tag=None)
    backend = {"id": 9, "project": 3, "url": "http://api/v1/digits", "title": "digits v0"}
    backend |= {"auth_method": "BASIC_AUTH", "basic_auth_user": "digits"}

    def answer(request: Any) -> Answer:
        if request.method == "PATCH":
            backend["title"] = request.json["title"]
        if request.path.startswith("/api/tasks"):
            return Answer(body={"tasks": [] if "%22value%22%3A+9%7D" in request.path else [{"id": 8}, {"id": 9}]})
        return Answer(body=[backend] if request.method == "GET" else {})

    label_studio.answer = answer
    handler = examples.load_handler("refresh")
    messages = [{"model": "digits", "version": 4}, {"model": "unknown", "version": 1}, "no json"]
    assert failures(handler.handler(sqs_event(*messages), LambdaContext())) == ["m1", "m2"]
    assert label_studio.paths == ["GET /api/ml?project=3", "PATCH /api/ml/9", "GET /api/ml?project=3"]
    assert label_studio.requests[1].json["title"] == "digits v5", "what serves, not what the event says"
    assert label_studio.requests[1].json["basic_auth_pass"] == "its own"

    assert failures(handler.handler(sqs_event({"model": "digits", "version": 5}), LambdaContext())) == []
    assert heard(prelabel_queue) == {"model": "digits", "after": 0, "upto": 9}


def test_prelabel_looks_again_later_at_what_somebody_may_have_open(
    bucket: Bucket, ledger: Ledger, label_studio: RecordingServer, prelabel_queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = examples.brightness_model()
    bucket.put(artifacts.onnx_key("digits", 1), onnx)
    Champions(bucket).swap(examples.champion(1, onnx), tag=None)
    bucket.put("images/digits/a.png", examples.png(4))
    for name in ("ARTIFACTS_BUCKET", "IMAGES_BUCKET"):
        monkeypatch.setenv(f"LABELLOOP_{name}", bucket.name)
    monkeypatch.setenv("LABELLOOP_LEDGER_TABLE", ledger._table)
    ledger.set_project("digits", 3)
    written: list[Request] = []
    stored: list[dict[str, Any]] = [
        {"id": number, "task": 8, "model_version": version, "score": 0.5, "cluster": None, "result": []}
        for number, version in ((20, "digits v0"), (21, "digits v1"))
    ]

    def answer(request: Request) -> Answer:
        if request.method == "PATCH":
            written.append(request)
            (changed,) = (one for one in stored if request.path == f"/api/predictions/{one['id']}/")
            changed.update(request.json)
            return Answer(body={})
        task = {"id": 8, "data": {"image": f"s3://{bucket.name}/images/digits/a.png"}, "meta": {"group": "a" * 64}}
        now = datetime.now(UTC).isoformat()
        return Answer(body={"tasks": [{**task, "predictions": [{**p, "created_at": now, "updated_at": now} for p in stored]}]})

    label_studio.answer = answer
    handler = examples.load_handler("prelabel")
    messages = [{"model": "digits", "after": 0, "upto": 9}, "no json", {"model": "nobody", "after": 0, "upto": 1}]
    assert failures(handler.handler(sqs_event(*messages), LambdaContext())) == ["m1", "m2"]
    assert {request.json["model_version"] for request in written} == {"digits v1"}
    assert [region["value"]["choices"] for request in written for region in request.json["result"]] == [["4"]] * 2
    attributes = boto3.client("sqs").get_queue_attributes(QueueUrl=prelabel_queue, AttributeNames=["All"])["Attributes"]
    assert attributes["ApproximateNumberOfMessagesDelayed"] == "1"


def test_prelabel_counts_drift_where_there_is_any(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "labelloop-test")
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "prelabel")
    handler = examples.load_handler("prelabel")

    def drifts(drift: Drift | None) -> list[float]:
        monkeypatch.setattr(handler, "prelabeller", lambda: lambda _: Prelabelled(drift=drift))
        answer = handler.handler(sqs_event({"model": "digits", "after": 0, "upto": 9}), LambdaContext())
        assert failures(answer) == []
        found = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if "_aws" in line]
        for line in found:
            (metrics,) = line["_aws"]["CloudWatchMetrics"]
            assert (metrics["Namespace"], metrics["Dimensions"], line["service"]) == ("labelloop-test", [["service"]], "prelabel")
        return [value for line in found for value in line["Drift"]]

    assert drifts(None) == drifts(Drift(served=[])) == []
    assert drifts(Drift(served=[], embedding=1.5, confidence=None)) == [1.5]
    assert drifts(Drift(served=[], embedding=1.5, confidence=7.0)) == [7.0]
