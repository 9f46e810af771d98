"""The serving stack: every route asks for credentials, and what need not run a function does not."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from infra_cdk.sources import ROOT
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


def called(serving: Template) -> set[str]:
    """Logical ids of what the API's routes to predict call, and of what it may: they have to be the same."""
    methods = methods_of(serving)
    uris = {flat(methods[route]["Integration"]["Uri"]) for route in [("POST", "setup"), ("POST", "predict"), ("GET", "versions")]}
    permissions = [p["Properties"]["FunctionName"] for p in serving.of_type("Lambda::Permission").values()]
    authorizer = serving.id_of(serving.functions["authorize"])
    permitted = {flat(name).strip("<>").removesuffix(".Arn") for name in permissions} - {authorizer}
    assert all(any(f"<{id}" in uri for id in permitted) for uri in uris)
    return permitted


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = tmp_path_factory.mktemp("at-once")
    return synthesize(context_of(folder, deployment="at once"), folder / "out").serving


def test_predict_starts_cold(either: Templates) -> None:
    assert "SnapStart" not in either.serving.functions["predict"]["Properties"]
    assert not [a for a in either.serving.of_type("Lambda::Alias").values() if "ProvisionedConcurrencyConfig" in a["Properties"]]


def test_a_laptop_calls_predict_itself_and_has_nothing_of_codedeploy(local: Templates) -> None:
    serving = local.serving
    assert called(serving) == {serving.id_of(serving.functions["predict"])}
    for kind in ("Lambda::Version", "Lambda::Alias", "CodeDeploy::Application", "CodeDeploy::DeploymentGroup"):
        assert not serving.of_type(kind)


def test_a_new_version_gets_a_tenth_of_the_requests_until_five_minutes_passed_without_an_alarm(prod: Templates) -> None:
    serving = prod.serving
    (group_id, found), ((alias_id, alias),) = (
        next(iter(serving.of_type("CodeDeploy::DeploymentGroup").items())),
        serving.of_type("Lambda::Alias").items(),
    )
    group = found["Properties"]
    (version,) = serving.of_type("Lambda::Version")
    assert called(serving) == {alias_id}
    assert alias["Properties"]["FunctionVersion"] == {"Fn::GetAtt": [version, "Version"]}
    assert alias["UpdatePolicy"] == {
        "CodeDeployLambdaAliasUpdate": {"ApplicationName": group["ApplicationName"], "DeploymentGroupName": {"Ref": group_id}}
    }
    assert serving.only("CodeDeploy::Application")["Properties"]["ComputePlatform"] == "Lambda"
    assert group["DeploymentConfigName"] == "CodeDeployDefault.LambdaCanary10Percent5Minutes"
    alarm = serving.only("CloudWatch::Alarm", MetricName="5XXError")
    assert group["AlarmConfiguration"] == {"Alarms": [{"Name": {"Ref": serving.id_of(alarm)}}], "Enabled": True}
    taken_back = {"DEPLOYMENT_FAILURE", "DEPLOYMENT_STOP_ON_ALARM", "DEPLOYMENT_STOP_ON_REQUEST"}
    assert group["AutoRollbackConfiguration"]["Enabled"] is True
    assert set(group["AutoRollbackConfiguration"]["Events"]) == taken_back


def test_a_failed_request_rings_within_the_window(either: Templates) -> None:
    """The API's own count: predict answers its errors itself, with 500, and Lambda counts those as successes."""
    serving = either.serving
    alarm = serving.only("CloudWatch::Alarm", MetricName="5XXError")["Properties"]
    assert (alarm["Namespace"], alarm["Statistic"], alarm["Threshold"]) == ("AWS/ApiGateway", "Sum", 1)
    assert (alarm["Period"], alarm["EvaluationPeriods"], alarm["TreatMissingData"]) == (60, 1, "notBreaching")
    assert alarm["Dimensions"] == [{"Name": "ApiName", "Value": serving.only("ApiGateway::RestApi")["Properties"]["Name"]}]


def test_codedeploy_may_move_this_alias_and_no_other(prod: Templates) -> None:
    serving = prod.serving
    group = serving.only("CodeDeploy::DeploymentGroup")
    role = group["Properties"]["ServiceRoleArn"]["Fn::GetAtt"][0]
    assert "ManagedPolicyArns" not in serving.resources[role]["Properties"]
    assert serving.resources[role]["Properties"]["AssumeRolePolicyDocument"]["Statement"] == [
        {"Action": "sts:AssumeRole", "Effect": "Allow", "Principal": {"Service": "codedeploy.amazonaws.com"}}
    ]
    predict = serving.id_of(serving.functions["predict"])
    granted = {
        (action, flat(resource))
        for statement in serving.statements(role)
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
        for resource in (statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]])
    }
    moving = {"lambda:GetAlias", "lambda:UpdateAlias", "lambda:GetProvisionedConcurrencyConfig"}
    assert granted == {
        *((action, f"<{predict}.Arn>{qualifier}") for action in moving for qualifier in ("", ":live")),
        ("cloudwatch:DescribeAlarms", "arn:<AWS::Partition>:cloudwatch:<AWS::Region>:<AWS::AccountId>:alarm:*"),
    }
    (policy,) = (id for id, p in serving.of_type("IAM::Policy").items() if {"Ref": role} in p["Properties"]["Roles"])
    assert policy in group["DependsOn"], "a deployment may follow at once"


def test_a_stage_may_move_to_a_new_version_at_once(at_once: Template) -> None:
    ((alias_id, alias),) = at_once.of_type("Lambda::Alias").items()
    assert called(at_once) == {alias_id}
    assert "UpdatePolicy" not in alias
    assert not at_once.of_type("CodeDeploy::DeploymentGroup")
    assert at_once.only("CloudWatch::Alarm", MetricName="5XXError")


def test_a_changed_model_is_a_new_version_although_only_a_layer_differs(prod: Templates, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "model_configs", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))

    def version() -> str:
        context = {**context_of(tmp_path), "model_configs": str(tmp_path / "models")}
        (found,) = synthesize(context, tmp_path / "out").serving.of_type("Lambda::Version")
        return found

    before = version()
    assert before == next(iter(prod.serving.of_type("Lambda::Version"))), "the same code, somewhere else"
    template = tmp_path / "models" / "digits" / "labeling_template.xml"
    template.write_text(f"{template.read_text()}\n")
    assert version() != before


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
    assert called(serving) == {alias_id}
    assert "CodeDeployLambdaAliasUpdate" in alias["UpdatePolicy"], "the same alias, moved the same way"
    assert "SnapStart" not in serving.functions["authorize"]["Properties"]
