"""The training stack: every asynchronous step is rule, queue, function, dead-letter queue, and nothing gets lost on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import aws_cdk as cdk
import pytest

from infra_cdk.constructs.training_jobs import registry_account
from labelloop import drift
from labelloop.errors import ConfigError
from labelloop.messages import LONGEST, delay
from tests.infra.templates import Resource, Template, Templates, context_of, flat, synthesize

WORKERS = {
    "ingest": (100, 5, 4),
    "retrain": (10, None, 2),
    "promote": (10, None, 2),
    "refresh": (10, None, 2),
    "prelabel": (1, None, 2),
}


def queue_of(template: Template, worker: str) -> tuple[str, Resource]:
    (name,) = (n for n in template.of_type("SQS::Queue") if n.startswith(f"{worker.capitalize()}Queue"))
    return name, template.resources[name]


def target_bodies(template: Template, worker: str) -> list[Any]:
    """What the rules put into a worker's queue: a constant, a transformed event, or None for the event as it is."""
    arn = {"Fn::GetAtt": [queue_of(template, worker)[0], "Arn"]}
    bodies = []
    for rule in template.of_type("Events::Rule").values():
        for target in rule["Properties"]["Targets"]:
            if target["Arn"] == arn:
                bodies.append(target.get("InputTransformer") or target.get("Input"))
    return bodies


def rule_of(template: Template, name: str) -> dict[str, Any]:
    (rule,) = (r for n, r in template.of_type("Events::Rule").items() if n.startswith(name))
    return dict(rule["Properties"])


@pytest.mark.parametrize("worker", WORKERS)
def test_a_message_that_fails_for_good_is_kept_and_rings(either: Templates, worker: str) -> None:
    training = either.training
    _, queue = queue_of(training, worker)
    redrive = queue["Properties"]["RedrivePolicy"]
    assert redrive["maxReceiveCount"] == 20
    assert sum(map(delay, range(1, redrive["maxReceiveCount"]))) > 3 * 3600, "it outlives an outage of hours"
    dead_letters = redrive["deadLetterTargetArn"]["Fn::GetAtt"][0]
    assert training.resources[dead_letters]["Properties"]["MessageRetentionPeriod"] == 14 * 24 * 3600
    dimension = {"Name": "QueueName", "Value": {"Fn::GetAtt": [dead_letters, "QueueName"]}}
    alarm = training.only("CloudWatch::Alarm", Dimensions=[dimension])["Properties"]
    assert alarm["MetricName"] == "ApproximateNumberOfMessagesVisible"
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (1, "GreaterThanOrEqualToThreshold")


@pytest.mark.parametrize("worker", WORKERS)
def test_messages_that_nobody_takes_ring(either: Templates, worker: str) -> None:
    """Not those of a large batch, and not of every queue: each alarm costs ten cents a month."""
    name, _ = queue_of(either.training, worker)
    dimension = {"Name": "QueueName", "Value": {"Fn::GetAtt": [name, "QueueName"]}}
    alarms = [alarm["Properties"] for alarm in either.training.of_type("CloudWatch::Alarm").values()]
    found = [(alarm["MetricName"], alarm["Threshold"]) for alarm in alarms if alarm.get("Dimensions") == [dimension]]
    longest = {"ingest": 24 * 3600, "retrain": 3600, "promote": 3600}.get(worker)
    assert found == ([("ApproximateAgeOfOldestMessage", longest)] if longest else [])


@pytest.mark.parametrize("worker", WORKERS)
def test_messages_that_go_on_failing_ring_whatever_their_age(either: Templates, worker: str) -> None:
    """SQS leaves a message that was received three times out of the age of the oldest."""
    training = either.training
    group = training.functions[worker]["Properties"]["LoggingConfig"]["LogGroup"]
    filters = [found["Properties"] for found in training.of_type("Logs::MetricFilter").values()]
    ours = [found for found in filters if found["LogGroupName"] == group]
    alarm = training.only("CloudWatch::Alarm", MetricName="MessagesFailed")["Properties"]
    counted = {
        found["FilterPattern"]
        for found in ours
        for metric in found["MetricTransformations"]
        if (metric["MetricNamespace"], metric["MetricName"]) == (alarm["Namespace"], alarm["MetricName"])
    }
    assert counted == {
        '{ $.level = "ERROR" }',
        '?"[ERROR]" ?"Task timed out" ?"Runtime exited" ?"OutOfMemory"',
    }
    assert alarm["Period"] >= LONGEST, "each period has a failure, where one message fails alone"
    assert (alarm["DatapointsToAlarm"], alarm["EvaluationPeriods"]) == (3, 4), "a fault of a moment may lie in two"
    assert (alarm["Threshold"], alarm["Statistic"]) == (1, "Sum")


@pytest.mark.parametrize("worker", WORKERS)
def test_a_queue_waits_for_its_function_and_takes_back_single_messages(either: Templates, worker: str) -> None:
    training = either.training
    name, queue = queue_of(training, worker)
    function = training.functions[worker]
    assert queue["Properties"]["VisibilityTimeout"] >= 6 * function["Properties"]["Timeout"]
    mapping = training.only("Lambda::EventSourceMapping", EventSourceArn={"Fn::GetAtt": [name, "Arn"]})["Properties"]
    assert mapping["FunctionName"] == {"Ref": training.id_of(function)}
    assert mapping["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    size, window, concurrency = WORKERS[worker]
    assert mapping["BatchSize"] == size
    assert mapping.get("MaximumBatchingWindowInSeconds") == window
    assert mapping["ScalingConfig"] == {"MaximumConcurrency": concurrency}


def test_queues_are_encrypted_and_refuse_what_comes_without_tls(either: Templates) -> None:
    training = either.training
    queues = training.of_type("SQS::Queue")
    assert len(queues) == 2 * len(WORKERS)
    for name, queue in queues.items():
        assert queue["Properties"]["SqsManagedSseEnabled"] is True
        policies = [
            p["Properties"] for p in training.of_type("SQS::QueuePolicy").values() if {"Ref": name} in p["Properties"]["Queues"]
        ]
        statements = [s for policy in policies for s in policy["PolicyDocument"]["Statement"]]
        assert any(
            s["Effect"] == "Deny" and s["Condition"] == {"Bool": {"aws:SecureTransport": "false"}} and s["Action"] == "sqs:*"
            for s in statements
        )
        # Only this stage's rules may send from EventBridge.
        allowed = [s for s in statements if s["Effect"] == "Allow"]
        assert all("aws:SourceArn" in json.dumps(s["Condition"]) for s in allowed)


def test_drift_raises_an_alarm(either: Templates) -> None:
    variables = either.training.functions["prelabel"]["Properties"]["Environment"]["Variables"]
    alarm = either.training.only("CloudWatch::Alarm", MetricName="Drift")["Properties"]
    assert alarm["Namespace"] == variables["POWERTOOLS_METRICS_NAMESPACE"] == f"labelloop-{variables['LABELLOOP_STAGE']}"
    assert alarm["Dimensions"] == [{"Name": "service", "Value": variables["POWERTOOLS_SERVICE_NAME"]}]
    assert (alarm["Statistic"], alarm["Threshold"], alarm["TreatMissingData"]) == ("Maximum", drift.ALARM, "notBreaching")
    assert alarm["ComparisonOperator"] == "GreaterThanOrEqualToThreshold"


def test_an_uploaded_image_goes_to_ingest_as_it_is(either: Templates) -> None:
    assert target_bodies(either.training, "ingest") == [None]
    pattern = rule_of(either.training, "ImageUploaded")["EventPattern"]
    assert pattern["source"] == ["aws.s3"]
    assert pattern["detail-type"] == ["Object Created"]
    assert pattern["detail"]["object"] == {"key": [{"prefix": "images/"}]}
    assert "Images" in flat(pattern["detail"]["bucket"]["name"][0])


def test_retrain_is_told_by_the_schedule_by_a_jobs_end_and_by_the_gates_decision(either: Templates) -> None:
    bodies = target_bodies(either.training, "retrain")
    assert '{"action":"SCHEDULE"}' in bodies
    transformed = {body["InputTemplate"]: body["InputPathsMap"] for body in bodies if isinstance(body, dict)}
    assert transformed == {
        '{"model":<detail-HyperParameters-model>,"action":"TRAINING_ENDED"}': {
            "detail-HyperParameters-model": "$.detail.HyperParameters.model"
        },
        '{"model":<detail-model>,"action":"VERSION_JUDGED"}': {"detail-model": "$.detail.model"},
    }
    judged = rule_of(either.training, "VersionJudged")
    assert judged["EventPattern"] == {"source": ["labelloop"], "detail-type": ["ModelPromoted", "ModelKept"]}
    assert rule_of(either.training, "Schedule")["ScheduleExpression"] == "rate(5 minutes)"


def test_promote_is_told_by_a_jobs_end(either: Templates) -> None:
    (transformed,) = target_bodies(either.training, "promote")
    assert transformed["InputTemplate"] == '{"model":<detail-HyperParameters-model>,"job_name":<detail-TrainingJobName>}'


@pytest.mark.parametrize(("stage", "sources"), [("prod", ["aws.sagemaker"]), ("local", ["aws.sagemaker", "labelloop.sagemaker"])])
def test_a_jobs_end_is_one_of_this_stage(stage: str, sources: list[str], request: pytest.FixtureRequest) -> None:
    templates: Templates = request.getfixturevalue(stage)
    pattern = rule_of(templates.training, "TrainingEnded")["EventPattern"]
    assert pattern == {
        "source": sources,
        "detail-type": ["SageMaker Training Job State Change"],
        "detail": {
            "TrainingJobStatus": ["Completed", "Failed", "Stopped"],
            "TrainingJobName": [{"prefix": f"labelloop-{stage}-"}],
        },
    }


def test_refresh_is_told_of_a_decision_with_a_number_for_a_version(either: Templates) -> None:
    (transformed,) = target_bodies(either.training, "refresh")
    assert transformed["InputTemplate"] == '{"model":<detail-model>,"version":<detail-version>}'
    assert "EventBus" in flat(rule_of(either.training, "VersionJudged")["EventBusName"])


@pytest.mark.parametrize("function", ["ingest", "refresh", "prelabel"])
def test_who_fills_the_prelabel_queue_knows_where_it_is(either: Templates, function: str) -> None:
    name, _ = queue_of(either.training, "prelabel")
    variables = either.training.functions[function]["Properties"]["Environment"]["Variables"]
    assert variables["LABELLOOP_PRELABEL_QUEUE"] == {"Ref": name}


def test_no_rule_fills_the_prelabel_queue(either: Templates) -> None:
    assert target_bodies(either.training, "prelabel") == []


def test_prelabel_runs_models_and_the_other_workers_do_not(either: Templates) -> None:
    layers = {name: len(function["Properties"]["Layers"]) for name, function in either.training.functions.items()}
    assert layers == {"ingest": 3, "retrain": 3, "promote": 3, "refresh": 3, "prelabel": 4}
    assert either.training.functions["prelabel"]["Properties"]["MemorySize"] == 1769


def test_the_training_job_gets_its_code_whole_and_clean(either: Templates) -> None:
    assets = json.loads((either.training.folder / f"{_stack_name(either)}.assets.json").read_text())["files"]
    (path,) = (either.training.folder / f["source"]["path"] for f in assets.values() if f["displayName"] == "Jobs/Code")
    assert sorted(p.name for p in path.iterdir()) == ["labelloop", "model_configs", "training_jobs"]
    assert (path / "labelloop" / "imaging.py").is_file()
    assert (path / "model_configs" / "digits" / "model.py").is_file()
    assert not [p for p in path.rglob("*") if p.name == "__pycache__" or p.suffix == ".pyc"]


def test_the_training_image_is_awss_own_for_the_region(prod: Templates) -> None:
    from sagemaker.core import image_uris  # knows AWS's deep learning containers; imports for seconds

    known = image_uris.retrieve(
        "pytorch-amzn2023", region="us-east-1", version="2.14", instance_type="ml.g5.xlarge", image_scope="training"
    )
    image = flat(prod.training.functions["retrain"]["Properties"]["Environment"]["Variables"]["LABELLOOP_TRAINING_IMAGE"])
    assert ".dkr.ecr." in image
    assert image.rpartition("/")[2] == known.rpartition("/")[2]


def test_every_region_that_has_the_training_image_can_be_deployed_to() -> None:
    import sagemaker.core.image_uris as sdk

    known = json.loads((Path(sdk.__file__).parent / "image_uri_config" / "pytorch-amzn2023.json").read_text())
    accounts = known["training"]["versions"]["2.14"]["registries"]
    assert len(accounts) > 30
    app = cdk.App()
    stacks = {region: cdk.Stack(app, region, env=cdk.Environment(region=region)) for region in accounts}
    assert {region: registry_account(stack) for region, stack in stacks.items()} == accounts


def test_a_region_without_the_training_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prod\.region: .* in eu-nowhere-1") as caught:
        synthesize(context_of(tmp_path, region="eu-nowhere-1"), tmp_path / "out")
    assert caught.value.where == str(tmp_path / "stages.yaml")


def test_training_can_let_go_of_the_app_before_the_app_goes(tmp_path: Path) -> None:
    """docs/stages.md, from the App to a server: with the new facts it takes only what the state stack as it was gives."""

    def taken(template: Template) -> set[str]:
        return set(re.findall(r'"Fn::ImportValue": "([^"]+)"', json.dumps(template.body)))

    def given(template: Template) -> set[str]:
        return {output["Export"]["Name"] for output in template.body["Outputs"].values() if "Export" in output}

    app = synthesize(context_of(tmp_path / "app"), tmp_path / "app" / "out")
    server = synthesize(context_of(tmp_path / "server", mlflow="https://mlflow.example.org"), tmp_path / "server" / "out")
    assert taken(server.training)
    assert taken(server.training) <= given(app.state)
    gone = given(app.state) - given(server.state)
    assert gone & taken(app.training), "why the order matters"
    assert not gone & taken(app.serving)


def _stack_name(templates: Templates) -> str:
    (manifest,) = templates.training.folder.glob("*-training.assets.json")
    return manifest.name.removesuffix(".assets.json")


def test_training_jobs_run_in_the_stages_network(tmp_path: Path) -> None:
    network = {"subnets": ["subnet-1a", "subnet-2b"], "security_groups": ["sg-3c"]}
    training = synthesize(context_of(tmp_path, training_network=network), tmp_path / "out").training  # cdk-nag would stop it
    variables = training.functions["retrain"]["Properties"]["Environment"]["Variables"]
    assert variables["LABELLOOP_TRAINING_SUBNETS"] == "subnet-1a,subnet-2b"
    assert variables["LABELLOOP_TRAINING_SECURITY_GROUPS"] == "sg-3c"
    (role,) = (id for id in training.of_type("IAM::Role") if id.startswith("JobsRole"))
    on = {
        flat(resource).rpartition(":")[2]
        for statement in training.statements(role)
        if "ec2:CreateNetworkInterface" in statement["Action"]
        for resource in (statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]])
    }
    assert on == {"network-interface/*", "subnet/subnet-1a", "subnet/subnet-2b", "security-group/sg-3c"}
