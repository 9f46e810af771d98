"""The workflows stack: who is let in, exactly, and what for; and that it is there only when somebody asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import infra_cdk.app
from cli.cost import RULES, PriceTable
from labelloop.errors import ConfigError
from tests.infra.templates import Template, Templates, context_of, flat, new_app

REPOSITORY = "acme/labels"
GITHUB = "token.actions.githubusercontent.com"
NAMES = ("state", "training", "serving")
MAIN, PULL_REQUEST = f"repo:{REPOSITORY}:ref:refs/heads/main", f"repo:{REPOSITORY}:pull_request"


def bodies(folder: Path, **workflows: str) -> dict[str, Template]:
    """All stacks by the last word of their names."""
    app = new_app(context_of(folder, workflows=workflows), folder / "out")
    infra_cdk.app.build(app)
    return {stack.stack_name.rpartition("-")[2]: Template(stack.template, folder) for stack in app.synth().stacks}


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    return bodies(tmp_path_factory.mktemp("workflows"), repository=REPOSITORY)


@pytest.fixture(scope="module")
def workflows(stacks: dict[str, Template]) -> Template:
    return stacks["workflows"]


def role(workflows: Template, name: str) -> tuple[str, dict[str, Any]]:
    (id,) = (id for id in workflows.of_type("IAM::Role") if id.startswith(name))
    return id, workflows.resources[id]["Properties"]


def granted(workflows: Template, name: str) -> set[tuple[str, str]]:
    id, _ = role(workflows, name)
    found = set()
    for statement in workflows.statements(id):
        assert statement["Effect"] == "Allow"
        for action in statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]:
            for resource in statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]:
                found.add((action, flat(resource)))
    return found


def trust(workflows: Template, name: str) -> Any:
    (statement,) = role(workflows, name)[1]["AssumeRolePolicyDocument"]["Statement"]
    return dict(statement)


def test_without_a_repository_nobody_is_let_in(prod: Templates) -> None:
    """The fixture's templates are all that there are, or it would fail."""
    for template in prod:
        assert not template.of_type("IAM::OIDCProvider")


def test_asking_for_it_changes_no_other_stack(stacks: dict[str, Template], prod: Templates) -> None:
    others = [stacks[name].body for name in NAMES]
    assert others == [template.body for template in prod]


@pytest.mark.parametrize(("name", "subject"), [("Diff", PULL_REQUEST), ("Deploy", MAIN), ("Smoke", MAIN), ("Train", MAIN)])
def test_a_role_is_for_one_repository_and_one_kind_of_run(workflows: Template, name: str, subject: str) -> None:
    (provider,) = workflows.of_type("IAM::OIDCProvider")
    statement = trust(workflows, name)
    assert flat(statement.pop("Principal")["Federated"]) in (f"<{provider}>", f"<{provider}.Arn>")
    assert statement == {
        "Effect": "Allow",
        "Action": "sts:AssumeRoleWithWebIdentity",
        "Condition": {"StringEquals": {f"{GITHUB}:aud": "sts.amazonaws.com", f"{GITHUB}:sub": subject}},
    }


def test_there_are_these_four_roles_and_no_other_policies(workflows: Template) -> None:
    assert len(workflows.of_type("IAM::Role")) == 4
    assert set(workflows.outputs) == {"DiffRoleArn", "DeployRoleArn", "SmokeRoleArn", "TrainRoleArn"}
    for one in workflows.of_type("IAM::Role").values():
        assert not {"ManagedPolicyArns", "Policies"} & one["Properties"].keys()


def test_the_provider_takes_tokens_for_aws_only(workflows: Template) -> None:
    provider = workflows.only("IAM::OIDCProvider")["Properties"]
    assert (provider["Url"], provider["ClientIdList"]) == (f"https://{GITHUB}", ["sts.amazonaws.com"])


def test_comparing_reads_templates_and_nothing_else(workflows: Template) -> None:
    stacks = "arn:<AWS::Partition>:cloudformation:<AWS::Region>:<AWS::AccountId>:stack/labelloop-prod-*/*"
    wanted = {(f"cloudformation:{action}", stacks) for action in ("DescribeStacks", "GetTemplate")}
    assert granted(workflows, "Diff") == wanted


def test_deploying_takes_over_the_roles_of_cdk_bootstrap_and_nothing_else(workflows: Template) -> None:
    arn = "arn:<AWS::Partition>:iam::<AWS::AccountId>:role/cdk-hnb659fds-{}-role-<AWS::AccountId>-<AWS::Region>"
    wanted = {("sts:AssumeRole", arn.format(name)) for name in ("deploy", "file-publishing", "lookup")}
    assert granted(workflows, "Deploy") == wanted


def test_trying_and_training_may_do_what_they_do(workflows: Template) -> None:
    def told(name: str) -> set[str]:
        """Without the stacks, which all of them read; a bucket's imported name as its first word."""
        found = set()
        for action, resource in granted(workflows, name):
            if action == "cloudformation:DescribeStacks":
                assert "labelloop-prod-" in resource
                continue
            bucket = next((word for word in ("Images", "Artifacts") if word in resource), "")
            what = f"{bucket} {resource.partition('/')[2]}" if action.startswith(("s3:", "secretsmanager:")) else ""
            found.add(f"{action} {what.strip()}".strip())
        return found

    assert told("Smoke") == {
        "secretsmanager:GetSecretValue prod/label-studio-??????",
        "secretsmanager:GetSecretValue prod/backend/*",
        "dynamodb:GetItem",
        "s3:GetObject Artifacts champions/*",
        "s3:ListBucket Artifacts",
        "s3:GetBucketCORS Images",
    }
    assert told("Train") == {
        "sqs:SendMessage",
        "dynamodb:GetItem",
        "dynamodb:Query",
        "s3:GetObject Artifacts champions/*",
        "s3:GetObject Artifacts models/*",
        "s3:ListBucket Artifacts",
    }
    (queue,) = (resource for action, resource in granted(workflows, "Train") if action == "sqs:SendMessage")
    assert "RetrainQueue" in queue
    assert "DeadLetters" not in queue


def test_only_a_training_is_waited_for_for_hours(workflows: Template) -> None:
    longest = {name: role(workflows, name)[1].get("MaxSessionDuration") for name in ("Diff", "Deploy", "Smoke", "Train")}
    assert longest == {"Diff": None, "Deploy": None, "Smoke": None, "Train": 6 * 3600}


def test_another_forge_branch_and_provider(tmp_path: Path) -> None:
    provider = "arn:aws:iam::123456789012:oidc-provider/forge.example.org/api/actions"
    template = bodies(
        tmp_path,
        repository="acme@12/labels@345",
        issuer="https://forge.example.org/api/actions",
        provider=provider,
        branch="release/1.x",
    )["workflows"]
    assert not template.of_type("IAM::OIDCProvider")
    statement = trust(template, "Deploy")
    assert statement["Principal"] == {"Federated": provider}
    assert statement["Condition"]["StringEquals"] == {
        "forge.example.org/api/actions:aud": "sts.amazonaws.com",
        "forge.example.org/api/actions:sub": "repo:acme@12/labels@345:ref:refs/heads/release/1.x",
    }


@pytest.mark.parametrize(
    ("workflows", "key"),
    [
        ({"repository": "labels"}, "repository"),
        ({"repository": "acme/*"}, "repository"),
        ({"repository": "*/labels"}, "repository"),
        ({"repository": "acme/labels:ref"}, "repository"),
        ({"repository": REPOSITORY, "issuer": "http://forge.example.org"}, "issuer"),
        ({"repository": REPOSITORY, "provider": "github"}, "provider"),
        ({"repository": REPOSITORY, "branch": "*"}, "branch"),
    ],
)
def test_what_could_let_anybody_in_is_refused(workflows: dict[str, str], key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        infra_cdk.app.build(new_app(context_of(tmp_path, workflows=workflows), tmp_path / "out"))
    assert caught.value.key == f"prod.workflows.{key}"


def test_every_type_of_the_stack_has_a_price(workflows: Template) -> None:
    kinds = {resource["Type"] for resource in workflows.resources.values()}
    assert kinds <= {*PriceTable.read("us-east-1").free, *RULES}


def test_the_template_has_no_lint(workflows: Template, tmp_path: Path) -> None:
    file = tmp_path / "workflows.json"
    file.write_text(json.dumps(workflows.body))
    program = Path(sys.executable).parent / "cfn-lint"
    command: list[str | Path] = [program, "--regions", "us-east-1", "--format", "parseable", "--", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
