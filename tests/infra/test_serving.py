"""The serving stack: every route asks for credentials, and what need not run a function does not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from tests.infra.templates import Template, Templates, context_of, flat, synthesize

ROUTES = {
    ("GET", "health"): "MOCK",
    ("POST", "setup"): "AWS_PROXY",
    ("POST", "predict"): "AWS_PROXY",
    ("GET", "versions"): "AWS_PROXY",
    ("POST", "webhook"): "AWS",
}


def methods_of(serving: Template) -> dict[tuple[str, str], dict[str, Any]]:
    resources = serving.of_type("ApiGateway::Resource")
    (model,) = (name for name, r in resources.items() if r["Properties"]["PathPart"] == "{model}")
    found = {}
    for method in serving.of_type("ApiGateway::Method").values():
        resource = resources[method["Properties"]["ResourceId"]["Ref"]]["Properties"]
        assert resource["ParentId"] == {"Ref": model}
        found[(method["Properties"]["HttpMethod"], resource["PathPart"])] = method["Properties"]
    return found


def test_there_are_five_routes_for_a_model(either: Templates) -> None:
    methods = methods_of(either.serving)
    assert {route: method["Integration"]["Type"] for route, method in methods.items()} == ROUTES


def test_every_route_asks_the_one_authorizer(either: Templates) -> None:
    authorizer = either.serving.only("ApiGateway::Authorizer")
    for method in methods_of(either.serving).values():
        assert method["AuthorizationType"] == "CUSTOM"
        assert method["AuthorizerId"] == {"Ref": either.serving.id_of(authorizer)}
    properties = authorizer["Properties"]
    assert properties["Type"] == "REQUEST"
    assert properties["IdentitySource"] == "method.request.header.Authorization"
    assert properties["AuthorizerResultTtlInSeconds"] == 3600
    assert either.serving.id_of(either.serving.functions["authorize"]) in json.dumps(properties["AuthorizerUri"])


def test_health_is_a_constant(either: Templates) -> None:
    integration = methods_of(either.serving)["GET", "health"]["Integration"]
    (answer,) = integration["IntegrationResponses"]
    assert answer["StatusCode"] == "200"
    assert json.loads(answer["ResponseTemplates"]["application/json"]) == {"status": "UP"}


def test_a_webhook_is_queued_without_a_function(either: Templates) -> None:
    webhook = methods_of(either.serving)["POST", "webhook"]["Integration"]
    assert "RetrainQueue" in flat(webhook["Uri"])
    assert webhook["PassthroughBehavior"] == "NEVER"
    assert list(webhook["RequestTemplates"]) == ["application/json"]
    assert webhook["RequestParameters"] == {"integration.request.header.Content-Type": "'application/x-www-form-urlencoded'"}
    answers = {
        a["StatusCode"]: (a.get("SelectionPattern"), a["ResponseTemplates"]["application/json"])
        for a in webhook["IntegrationResponses"]
    }
    assert answers["201"] == (None, '{"status":"ok"}')
    assert answers["503"][0] == r"[45]\d{2}"


def test_a_webhooks_message_names_model_and_action(prod: Templates) -> None:
    template = methods_of(prod.serving)["POST", "webhook"]["Integration"]["RequestTemplates"]["application/json"]
    filled = template.replace("$util.urlEncode($util.urlEncode($input.params('model')))", "digits")
    filled = filled.replace("$util.urlEncode($util.urlEncode($input.path('$.action')))", "ANNOTATION_CREATED")
    assert parse_qs(filled) == {"Action": ["SendMessage"], "MessageBody": ['{"model":"digits","action":"ANNOTATION_CREATED"}']}


@pytest.mark.parametrize(
    ("body", "accepted"),
    [
        ({"action": "ANNOTATION_CREATED", "annotation": {"id": 1}}, True),
        ({"action": "START_TRAINING", "project": "5"}, True),
        ({}, False),
        ([], False),
        ("ANNOTATION_CREATED", False),
        ({"action": 5}, False),
        ({"action": ""}, False),
        ({"action": 'A","model":"other'}, False),
    ],
)
def test_only_events_of_label_studio_are_queued(prod: Templates, body: Any, accepted: bool) -> None:
    serving = prod.serving
    method = methods_of(serving)["POST", "webhook"]
    validator = serving.resources[method["RequestValidatorId"]["Ref"]]["Properties"]
    assert validator["ValidateRequestBody"] is True
    schema = serving.resources[method["RequestModels"]["application/json"]["Ref"]]["Properties"]["Schema"]
    jsonschema: Any = importlib.import_module("jsonschema")  # it comes without types
    assert jsonschema.Draft4Validator(schema).is_valid(body) is accepted


@pytest.mark.parametrize(("kind", "status"), [("UNAUTHORIZED", "401"), ("ACCESS_DENIED", "403"), ("BAD_REQUEST_BODY", "400")])
def test_refusals_are_json(prod: Templates, kind: str, status: str) -> None:
    response = prod.serving.only("ApiGateway::GatewayResponse", ResponseType=kind)["Properties"]
    assert response["StatusCode"] == status
    assert list(json.loads(response["ResponseTemplates"]["application/json"])) == ["error"]


def test_the_api_is_regional_logged_traced_and_throttled(prod: Templates) -> None:
    api = prod.serving.only("ApiGateway::RestApi")["Properties"]
    assert api["EndpointConfiguration"] == {"Types": ["REGIONAL"]}
    assert "BinaryMediaTypes" not in api
    stage = prod.serving.only("ApiGateway::Stage")["Properties"]
    assert stage["StageName"] == "v1"
    assert stage["TracingEnabled"] is True
    assert stage["AccessLogSetting"]["DestinationArn"]
    (settings,) = stage["MethodSettings"]
    assert settings["ThrottlingRateLimit"] > 0
    assert settings["ThrottlingBurstLimit"] > 0
    assert settings["DataTraceEnabled"] is False  # it would log credentials


def test_failed_sign_ins_raise_an_alarm(either: Templates) -> None:
    variables = either.serving.functions["authorize"]["Properties"]["Environment"]["Variables"]
    alarm = either.serving.only("CloudWatch::Alarm", MetricName="FailedSignIns")["Properties"]
    assert alarm["Namespace"] == variables["POWERTOOLS_METRICS_NAMESPACE"] == f"labelloop-{variables['LABELLOOP_STAGE']}"
    assert alarm["Dimensions"] == [{"Name": "service", "Value": variables["POWERTOOLS_SERVICE_NAME"]}]
    assert (alarm["Statistic"], alarm["Period"], alarm["Threshold"]) == ("Sum", 300, 10)
    assert alarm["ComparisonOperator"] == "GreaterThanOrEqualToThreshold"


def test_predict_is_as_large_as_the_largest_model_asks(prod: Templates) -> None:
    predict = prod.serving.functions["predict"]["Properties"]
    part = prod.serving.functions["predict_part"]["Properties"]
    for function in (predict, part):
        assert function["MemorySize"] == 1769
        assert function["Timeout"] == 29
        assert len(function["Layers"]) == 4
    assert len(prod.serving.functions["authorize"]["Properties"]["Layers"]) == 2


def test_predict_knows_its_parts_function_and_the_queue_and_its_parts_neither(either: Templates) -> None:
    variables = either.serving.functions["predict"]["Properties"]["Environment"]["Variables"]
    part = either.serving.functions["predict_part"]
    assert variables["LABELLOOP_PREDICT_PART_FUNCTION"] == {"Ref": either.serving.id_of(part)}
    assert "PrelabelQueue" in flat(variables["LABELLOOP_PRELABEL_QUEUE"])
    own = {"LABELLOOP_PREDICT_PART_FUNCTION", "LABELLOOP_PRELABEL_QUEUE"}
    assert part["Properties"]["Environment"]["Variables"].keys() == variables.keys() - own


def test_only_predict_may_invoke_and_only_the_parts(prod: Templates) -> None:
    invoking = []
    for name, function in prod.functions.items():
        template = prod.training if name in prod.training.functions else prod.serving
        (role,) = function["Properties"]["Role"]["Fn::GetAtt"][:1]
        invoking += [(name, s["Resource"]) for s in template.statements(role) if s["Action"] == "lambda:InvokeFunction"]
    part = prod.serving.id_of(prod.serving.functions["predict_part"])
    assert invoking == [("predict", {"Fn::GetAtt": [part, "Arn"]})]


def test_what_the_api_runs_is_bounded(prod: Templates, tmp_path: Path) -> None:
    bounds = {name: f["Properties"]["ReservedConcurrentExecutions"] for name, f in prod.serving.functions.items()}
    assert bounds == {"authorize": 20, "predict": 100, "predict_part": 100}
    unbounded = synthesize(context_of(tmp_path, reserved_concurrency=False), tmp_path / "out").serving
    assert not [f for f in unbounded.functions.values() if "ReservedConcurrentExecutions" in f["Properties"]]


def test_predict_starts_cold_and_without_versions(either: Templates) -> None:
    assert not either.serving.of_type("Lambda::Version")
    assert not either.serving.of_type("Lambda::Alias")
    assert "SnapStart" not in either.serving.functions["predict"]["Properties"]


@pytest.mark.parametrize("predict_start", ["snapshot", 3])
def test_predict_can_be_started_ahead(predict_start: str | int, tmp_path: Path) -> None:
    serving = synthesize(context_of(tmp_path, predict_start=predict_start), tmp_path / "out").serving  # cdk-nag would stop it
    predict, (alias_id, alias) = serving.functions["predict"], *serving.of_type("Lambda::Alias").items()
    (version_id,) = serving.of_type("Lambda::Version")
    assert alias["Properties"]["FunctionVersion"] == {"Fn::GetAtt": [version_id, "Version"]}
    assert alias["Properties"]["FunctionName"] == {"Ref": serving.id_of(predict)}
    assert predict["Properties"].get("SnapStart") == ({"ApplyOn": "PublishedVersions"} if predict_start == "snapshot" else None)
    ready = {"ProvisionedConcurrentExecutions": 3} if predict_start == 3 else None
    assert alias["Properties"].get("ProvisionedConcurrencyConfig") == ready
    for route in ("setup", "predict", "versions"):
        uri = next(m for (_, path), m in methods_of(serving).items() if path == route)["Integration"]["Uri"]
        assert f"<{alias_id}>" in flat(uri)
    granted = [p["Properties"]["FunctionName"] for p in serving.of_type("Lambda::Permission").values()]
    assert granted.count({"Ref": alias_id}) == 3
    assert {"Ref": serving.id_of(predict)} not in granted
    assert "SnapStart" not in serving.functions["authorize"]["Properties"]
