"""Who may do what: single actions, named resources, and the wildcards that are left."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import examples
from tests.infra.templates import Template, Templates, context_of, flat, synthesize

# What is granted on "*", because the service knows no resource for it.
WITHOUT_RESOURCE = {
    "xray:PutTraceSegments",
    "xray:PutTelemetryRecords",
    "ecr:GetAuthorizationToken",
    "cloudwatch:PutMetricData",
}

# Objects by bucket and prefix, and the rest by service.
FUNCTIONS = {
    "authorize": {"secretsmanager:GetSecretValue backend/*"},
    "ingest": {
        "s3:GetObject Images images/*",
        "s3:ListBucket Images",
        "s3:GetObject Artifacts champions/*",
        "s3:ListBucket Artifacts",
        "secretsmanager:GetSecretValue label-studio-??????",
        "dynamodb BatchWriteItem GetItem PutItem Query UpdateItem",
        "sqs:SendMessage",
    },
    "predict": {
        "s3:GetObject Images images/*",
        "s3:ListBucket Images",
        "s3:GetObject Artifacts champions/*",
        "s3:GetObject Artifacts models/*",
        "s3:ListBucket Artifacts",
        "secretsmanager:GetSecretValue label-studio-??????",
        "lambda:InvokeFunction",
        "sqs:SendMessage",
    },
    "predict_part": {
        "s3:GetObject Images images/*",
        "s3:ListBucket Images",
        "s3:GetObject Artifacts models/*",
        "s3:ListBucket Artifacts",
        "secretsmanager:GetSecretValue label-studio-??????",
    },
    "retrain": {
        "s3:GetObject Artifacts champions/*",
        "s3:GetObject Artifacts indexes/*",
        "s3:ListBucket Artifacts",
        "s3:PutObject Artifacts snapshots/*",
        "s3:PutObject Artifacts indexes/*",
        "secretsmanager:GetSecretValue label-studio-??????",
        "dynamodb GetItem PutItem Query",
        "sagemaker:CreateTrainingJob",
        "sagemaker:DescribeTrainingJob",
        "sagemaker:AddTags",
        "iam:PassRole",
        "sqs:SendMessage",
    },
    "promote": {
        "s3:GetObject Artifacts training/*",
        "s3:GetObject Artifacts champions/*",
        "s3:GetObject Artifacts models/*",
        "s3:ListBucket Artifacts",
        "s3:PutObject Artifacts models/*",
        "s3:PutObject Artifacts champions/*",
        "dynamodb GetItem PutItem Query",
        "events:PutEvents",
        "sagemaker:CallMlflowAppApi",
    },
    "refresh": {
        "s3:GetObject Artifacts champions/*",
        "s3:GetObject Artifacts models/*",
        "s3:ListBucket Artifacts",
        "secretsmanager:GetSecretValue label-studio-??????",
        "secretsmanager:GetSecretValue backend/*",
        "dynamodb GetItem PutItem Query",
        "sqs:SendMessage",
    },
    "prelabel": {
        "s3:GetObject Images images/*",
        "s3:ListBucket Images",
        "s3:GetObject Artifacts champions/*",
        "s3:GetObject Artifacts models/*",
        "s3:ListBucket Artifacts",
        "secretsmanager:GetSecretValue label-studio-??????",
        "dynamodb GetItem PutItem Query",
        "sqs:SendMessage",
    },
}
# Every function's own log, traces and queue.
OF_EVERY_FUNCTION = re.compile(r"logs:|xray:|sqs:(?!SendMessage)")


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def grants(template: Template, role: str) -> set[str]:
    """A role's statements in the words of the table above."""
    found = set()
    for statement in template.statements(role):
        actions = as_list(statement["Action"])
        assert statement["Effect"] == "Allow"
        for resource in map(flat, as_list(statement["Resource"])):
            for action in actions:
                service = action.partition(":")[0]
                bucket = "Images" if "Images" in resource else "Artifacts"
                if service == "s3":
                    if action != "s3:AbortMultipartUpload":
                        found.add(f"{action} {bucket} {resource.partition('/')[2]}".strip())
                elif service == "secretsmanager":
                    found.add(f"{action} {resource.partition('/')[2].partition('/')[2]}")
                elif service == "dynamodb":
                    found.add(" ".join(["dynamodb", *(each.removeprefix("dynamodb:") for each in sorted(actions))]))
                elif not OF_EVERY_FUNCTION.match(action):
                    found.add(action)
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_may_do_what_it_does_and_no_more(prod: Templates, function: str) -> None:
    template = prod.training if function in prod.training.functions else prod.serving
    (role,) = template.functions[function]["Properties"]["Role"]["Fn::GetAtt"][:1]
    assert grants(template, role) == FUNCTIONS[function]


def test_no_two_functions_share_a_role(either: Templates) -> None:
    roles = [flat(f["Properties"]["Role"]) for f in either.functions.values()]
    assert len(roles) == len(set(roles)) == 8


def test_a_training_job_may_read_its_inputs_and_write_its_outputs(prod: Templates) -> None:
    (role,) = (name for name in prod.training.of_type("IAM::Role") if name.startswith("JobsRole"))
    assert prod.training.resources[role]["Properties"]["AssumeRolePolicyDocument"]["Statement"] == [
        {"Action": "sts:AssumeRole", "Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}}
    ]
    objects = {g for g in grants(prod.training, role) if g.startswith(("s3:Put", "s3:Get")) and "*" in g}
    assert objects == {
        "s3:GetObject Images images/*",
        "s3:GetObject Artifacts snapshots/*",
        "s3:GetObject Artifacts models/*",
        "s3:GetObject Artifacts checkpoints/*",
        "s3:PutObject Artifacts training/*",
        "s3:PutObject Artifacts checkpoints/*",
        "s3:GetObject Artifacts cache/*",
        "s3:PutObject Artifacts cache/*",
        "s3:PutObject Artifacts mlflow/*",  # the App's bucket: MLflow's client writes there itself
    }


def test_no_action_is_a_wildcard_and_no_resource_is_everything(either: Templates) -> None:
    for template in either:
        for policy in template.of_type("IAM::Policy").values():
            for statement in policy["Properties"]["PolicyDocument"]["Statement"]:
                actions = as_list(statement["Action"])
                assert not [action for action in actions if "*" in action]
                if "*" in as_list(statement["Resource"]):
                    assert set(actions) <= WITHOUT_RESOURCE


def test_the_jobs_of_another_stage_are_out_of_reach(prod: Templates) -> None:
    (role,) = prod.training.functions["retrain"]["Properties"]["Role"]["Fn::GetAtt"][:1]
    (statement,) = (s for s in prod.training.statements(role) if "sagemaker:CreateTrainingJob" in as_list(s["Action"]))
    assert flat(statement["Resource"]).endswith(":training-job/labelloop-prod-*")


def test_only_sagemaker_gets_the_jobs_role(prod: Templates) -> None:
    (role,) = prod.training.functions["retrain"]["Properties"]["Role"]["Fn::GetAtt"][:1]
    (statement,) = (s for s in prod.training.statements(role) if s["Action"] == "iam:PassRole")
    assert statement["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
    assert flat(statement["Resource"]).startswith("<JobsRole")


def test_no_secret_stands_in_a_functions_environment(either: Templates) -> None:
    for function in either.functions.values():
        assert "resolve:secretsmanager" not in str(function["Properties"]["Environment"])


def test_the_training_job_may_read_the_very_weights_that_configs_name(tmp_path: Path) -> None:
    for name, weights in (("plain", "none"), ("mirrored", "s3://mirror/torchvision/net.pth")):
        examples.make_model_folder(tmp_path / "models", name, "multilabel", ["a"])
        file = tmp_path / "models" / name / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["architecture"]["weights"] = weights
        file.write_text(yaml.safe_dump(config))
    context = {**context_of(tmp_path), "model_configs": str(tmp_path / "models")}
    training = synthesize(context, tmp_path / "out").training
    (role,) = (name for name in training.of_type("IAM::Role") if name.startswith("JobsRole"))
    on_mirror = {
        (action, flat(resource))
        for statement in training.statements(role)
        for resource in as_list(statement["Resource"])
        for action in as_list(statement["Action"])
        if "mirror" in flat(resource)
    }
    assert on_mirror == {
        ("s3:GetObject", "arn:<AWS::Partition>:s3:::mirror/torchvision/net.pth"),
        ("s3:ListBucket", "arn:<AWS::Partition>:s3:::mirror"),
    }


def test_only_who_talks_to_a_server_of_mlflow_may_read_its_token(tmp_path: Path) -> None:
    templates = synthesize(context_of(tmp_path, mlflow="https://mlflow.example.org/"), tmp_path / "out")
    secret = templates.state.only("SecretsManager::Secret", Name="labelloop/prod/mlflow")["Properties"]
    assert secret["SecretString"] == '{"token":""}'
    training = templates.training
    (job,) = (name for name in training.of_type("IAM::Role") if name.startswith("JobsRole"))
    (promote,) = training.functions["promote"]["Properties"]["Role"]["Fn::GetAtt"][:1]
    readers = {
        role
        for template in templates
        for role in template.of_type("IAM::Role")
        if "secretsmanager:GetSecretValue mlflow-??????" in grants(template, role)
    }
    assert readers == {job, promote}
    for name in ("promote", "retrain"):
        variables = training.functions[name]["Properties"]["Environment"]["Variables"]
        assert variables["LABELLOOP_MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
        assert variables["LABELLOOP_MLFLOW_SECRET"] == "labelloop/prod/mlflow"
    assert not any("sagemaker:CallMlflowAppApi" in json.dumps(template.body) for template in templates)
