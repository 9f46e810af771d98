"""What an operator sees of a stage, and is told."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from infra_cdk.sources import ROOT
from labelloop.retrain import TRAINING_FAILED
from tests.infra.templates import Template, Templates, flat

OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def alarms(templates: Templates) -> dict[str, dict[str, Any]]:
    return {
        id: resource["Properties"] for template in templates for id, resource in template.of_type("CloudWatch::Alarm").items()
    }


def body(serving: Template) -> str:
    """The dashboard's JSON, references as `<name>`."""
    return flat(serving.only("CloudWatch::Dashboard")["Properties"]["DashboardBody"])


def widgets(serving: Template) -> dict[str, dict[str, Any]]:
    return {widget["properties"]["title"]: widget["properties"] for widget in json.loads(body(serving))["widgets"]}


def test_every_alarm_names_a_row_of_the_runbook_and_every_row_is_some_alarms(
    either: Templates, with_label_studio: dict[str, Template]
) -> None:
    rows = re.findall(r'^\| <a id="([\w-]+)"></a>', OPERATIONS, re.MULTILINE)
    named = [
        re.search(r"What to do: docs/operations\.md#([\w-]+)$", alarm["AlarmDescription"])
        for alarm in [*alarms(either).values(), with_label_studio["label-studio"].only("CloudWatch::Alarm")["Properties"]]
    ]
    assert None not in named
    assert {found[1] for found in named if found} == set(rows)
    assert len(rows) == len(set(rows))


def test_every_alarm_is_told_by_the_stages_topic(prod: Templates) -> None:
    topic = prod.state.only("SNS::Topic")
    assert topic["Properties"]["TopicName"] == "labelloop-prod-alarms"
    for alarm in alarms(prod).values():
        (told,) = alarm["AlarmActions"]
        assert flat(told) == "arn:<AWS::Partition>:sns:<AWS::Region>:<AWS::AccountId>:labelloop-prod-alarms"
    subscription = prod.state.only("SNS::Subscription")["Properties"]
    assert (subscription["Protocol"], subscription["Endpoint"]) == ("email", "operators@example.org")
    statements = prod.state.only("SNS::TopicPolicy")["Properties"]["PolicyDocument"]["Statement"]
    allowed, rules = (statement for statement in statements if statement["Effect"] == "Allow")
    assert rules["Principal"] == {"Service": "events.amazonaws.com"}
    assert allowed["Principal"] == {"Service": "cloudwatch.amazonaws.com"}
    assert allowed["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}


def test_without_an_address_nobody_is_written_to(local: Templates) -> None:
    assert not local.state.of_type("SNS::Subscription")


def test_a_failed_training_is_found_in_retrains_log(prod: Templates) -> None:
    every = [one["Properties"] for one in prod.training.of_type("Logs::MetricFilter").values()]
    (found,) = (one for one in every if one["MetricTransformations"][0]["MetricName"] == "TrainingsFailed")
    retrain = prod.training.functions["retrain"]["Properties"]
    assert found["LogGroupName"] == retrain["LoggingConfig"]["LogGroup"]
    assert found["FilterPattern"] == f'{{ $.message = "{TRAINING_FAILED}" }}'
    (metric,) = found["MetricTransformations"]
    assert (metric["MetricNamespace"], metric["MetricName"]) == ("labelloop-prod", "TrainingsFailed")


@pytest.mark.parametrize(
    ("status", "more"),
    [
        ("Failed", {"FailureReason": [{"anything-but": {"prefix": "CapacityError"}}]}),
        ("Stopped", {"SecondaryStatus": ["MaxRuntimeExceeded"]}),
    ],
)
def test_a_training_that_came_to_nothing_is_told_to_the_operator(prod: Templates, status: str, more: dict[str, Any]) -> None:
    rules = [rule["Properties"] for rule in prod.training.of_type("Events::Rule").values()]
    told = [rule for rule in rules if "sns" in flat(rule.get("Targets"))]
    (rule,) = (rule for rule in told if rule["EventPattern"]["detail"]["TrainingJobStatus"] == [status])
    name = [{"prefix": "labelloop-prod-"}]
    assert rule["EventPattern"]["detail"] == {"TrainingJobStatus": [status], "TrainingJobName": name, **more}
    (message,) = (target["InputTransformer"] for target in rule["Targets"])
    assert "docs/operations.md#trainings-failed" in message["InputTemplate"]
    assert set(message["InputPathsMap"].values()) == {"$.detail.TrainingJobName"}, (
        "EventBridge escapes nothing: a quote ends a text"
    )


def test_the_dashboard_shows_what_a_stage_does(prod: Templates) -> None:
    assert prod.serving.only("CloudWatch::Dashboard")["Properties"]["DashboardName"] == "labelloop-prod"
    assert list(widgets(prod.serving)) == [
        "Predictions (tasks)",
        "The API's answers (ms)",
        "Requests that failed",
        "Cold starts of predict, and how long they load (ms)",
        "Age of the oldest message (s)",
        "Messages that wait, and dead letters",
        "Annotated tasks",
        "Trainings",
        "Pre-annotations that annotators kept (%)",
        "Metric on the holdout, by model",
        "Versions",
        next(
            title for title in widgets(prod.serving) if title.startswith("Estimate of what ran ($ a day, us-east-1's prices of ")
        ),
    ]


def test_what_functions_count_is_what_the_dashboard_and_the_documentation_name(prod: Templates) -> None:
    shown = set(re.findall(r'"labelloop-prod","(\w+)"', body(prod.serving)))
    table = ARCHITECTURE[ARCHITECTURE.index("## Metrics") : ARCHITECTURE.index("## The front door")]
    documented = {name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    watched = {"FailedSignIns", "MessagesFailed", "Drift"}
    assert shown == documented - watched - {"f1"}, "alarms watch these; no model here is scored by the other"
    sources = "".join(
        (ROOT / "functions" / name / "handler.py").read_text() for name in ("authorize", "retrain", "promote", "prelabel")
    )
    for name in documented - {"TrainingsFailed", "MessagesFailed", "accuracy", "f1", "map_50"}:
        assert f'"{name}"' in sources


def test_the_estimate_is_one_that_cloudwatch_can_reckon(prod: Templates) -> None:
    title = next(title for title in widgets(prod.serving) if title.startswith("Estimate"))
    expressions = [one["expression"] for (one, *_) in widgets(prod.serving)[title]["metrics"] if isinstance(one, dict)]
    assert len(expressions) == 2
    for expression in expressions:
        assert re.fullmatch(r"FILL\(m\d+,0\)\*0\.\d+( \+ FILL\(m\d+,0\)\*0\.\d+)*", expression)
    assert expressions[0].count("FILL") == 2 * len(prod.functions) + 1, "time and calls of each function, and requests"


def test_queries_are_saved_for_whoever_looks_into_the_logs(prod: Templates, local: Templates) -> None:
    queries = [query["Properties"] for query in prod.serving.of_type("Logs::QueryDefinition").values()]
    documented = OPERATIONS[OPERATIONS.index("Saved queries") : OPERATIONS.index("## Alarms")]
    assert {query["Name"] for query in queries} == {f"labelloop-prod/{name}" for name in re.findall(r"\*([\w -]+)\*", documented)}
    errors = next(query for query in queries if query["Name"].endswith("/errors"))
    assert len(errors["LogGroupNames"]) == len(prod.functions)
    assert not local.serving.of_type("Logs::QueryDefinition"), "the emulator does not know the type"
