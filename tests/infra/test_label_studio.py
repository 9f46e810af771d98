"""Label Studio's own stack: who reaches what, what it is told, what outlives it, and that it is there only when asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import infra_cdk.app
from cli import cost
from cli.cost import PriceTable, Usage
from infra_cdk.sources import ROOT
from infra_cdk.stacks.label_studio import IMAGE
from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfigs
from local.stack import LABEL_STUDIO
from tests.infra.templates import Resource, Template, Templates, context_of, flat, new_app

DOMAIN = "labels.example.org"
SERVER = {"domain": DOMAIN, "admin_email": "admin@example.org", "hosted_zone": {"id": "Z0ABC", "name": "example.org"}}
CERTIFICATE = "arn:aws:acm:eu-west-1:123456789012:certificate/0a-1b"


def server(template: Template, kind: str) -> Resource:
    return dict(template.only(kind)["Properties"])


def container(template: Template, name: str) -> Resource:
    (found,) = (one for one in server(template, "ECS::TaskDefinition")["ContainerDefinitions"] if one["Name"] == name)
    return dict(found)


def environment(template: Template) -> dict[str, Any]:
    return {entry["Name"]: entry["Value"] for entry in container(template, "app")["Environment"]}


def granted(template: Template, role: str) -> set[tuple[str, str]]:
    (id,) = (id for id in template.of_type("IAM::Role") if id.startswith(role))
    found = set()
    for statement in template.statements(id):
        assert statement["Effect"] == "Allow"
        for action in statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]:
            for resource in statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]:
                found.add((action, flat(resource)))
    return found


def id_of(template: Template, kind: str, beginning: str) -> str:
    (id,) = (id for id in template.of_type(kind) if id.startswith(beginning))
    return id


@pytest.fixture(scope="module")
def template(with_label_studio: dict[str, Template]) -> Template:
    return with_label_studio["label-studio"]


def test_asking_for_it_changes_of_the_others_what_follows_from_it(
    with_label_studio: dict[str, Template], prod: Templates
) -> None:
    def plain(one: Template) -> str:
        body = {**one.body, "Outputs": {k: v for k, v in one.body.get("Outputs", {}).items() if "Export" not in v}}
        return json.dumps(body, indent=1, sort_keys=True).replace("https://label.example.org", f"https://{DOMAIN}")

    def differing(before: Template, after: Template) -> set[str]:
        return {id for id in before.resources.keys() | after.resources.keys() if plain_of(before, id) != plain_of(after, id)}

    def plain_of(one: Template, id: str) -> Any:
        return json.loads(plain(one))["Resources"].get(id)

    changed = {
        name: differing(before, with_label_studio[name])
        for name, before in zip(("state", "training", "serving"), prod, strict=True)
    }
    (token,) = changed.pop("state")
    assert token.startswith("SecretsLabelStudio")
    (schedule,) = changed.pop("training")
    assert schedule.startswith("Schedule")
    others = {id for id in changed.pop("serving") if not id.startswith("PredictFunctionCurrentVersion")}
    (alias,) = others  # another address is another version of predict
    assert alias.startswith("PredictAlias")
    assert with_label_studio["state"].outputs["LabelStudioUrl"] == f"https://{DOMAIN}"


def test_the_token_is_generated_where_label_studio_takes_it(with_label_studio: dict[str, Template]) -> None:
    secret = with_label_studio["state"].only("SecretsManager::Secret", Name="labelloop/prod/label-studio")["Properties"]
    assert "SecretString" not in secret
    assert secret["GenerateSecretString"] == {
        "SecretStringTemplate": "{}",
        "GenerateStringKey": "token",
        "PasswordLength": 40,
        "ExcludePunctuation": True,
    }


def test_each_look_wakes_the_database_so_the_schedule_comes_rarely(with_label_studio: dict[str, Template]) -> None:
    (rule,) = (
        rule["Properties"]
        for rule in with_label_studio["training"].of_type("Events::Rule").values()
        if "ScheduleExpression" in rule["Properties"]
    )
    assert rule["ScheduleExpression"] == "rate(1 hour)"


def test_the_network_has_no_part_that_costs_by_the_hour(template: Template) -> None:
    for kind in ("EC2::NatGateway", "EC2::EIP"):
        assert not template.of_type(kind)
    (endpoint,) = template.of_type("EC2::VPCEndpoint").values()
    assert endpoint["Properties"]["VpcEndpointType"] == "Gateway"
    assert flat(endpoint["Properties"]["ServiceName"]).endswith(".s3")


def test_the_database_has_no_way_out_and_none_in(template: Template) -> None:
    subnets = {flat(id) for id in server(template, "RDS::DBSubnetGroup")["SubnetIds"]}
    tables = {
        flat(link["Properties"]["RouteTableId"])
        for link in template.of_type("EC2::SubnetRouteTableAssociation").values()
        if flat(link["Properties"]["SubnetId"]) in subnets
    }
    assert len(subnets) == len(tables) == 2
    assert not {flat(route["Properties"]["RouteTableId"]) for route in template.of_type("EC2::Route").values()} & tables
    assert server(template, "RDS::DBInstance")["PubliclyAccessible"] is False


def test_the_task_is_reached_by_the_load_balancer_alone_and_the_database_by_the_task(template: Template) -> None:
    def group(name: str) -> str:
        return f"<{id_of(template, 'EC2::SecurityGroup', name)}.GroupId>"

    let_in = {
        (flat(rule["Properties"]["GroupId"]), flat(rule["Properties"]["SourceSecurityGroupId"]))
        for rule in template.of_type("EC2::SecurityGroupIngress").values()
    }
    task, balancer, database = group("Service"), group("BalancerSecurityGroup"), group("DatabaseSecurityGroup")
    assert let_in == {(task, balancer), (database, task)}
    open_to_all = {
        id: sorted(rule["FromPort"] for rule in one["Properties"]["SecurityGroupIngress"])
        for id, one in template.of_type("EC2::SecurityGroup").items()
        if "SecurityGroupIngress" in one["Properties"]
    }
    assert open_to_all == {id_of(template, "EC2::SecurityGroup", "BalancerSecurityGroup"): [80, 443]}
    network = server(template, "ECS::Service")["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert [flat(id) for id in network["SecurityGroups"]] == [task]
    assert network["AssignPublicIp"] == "ENABLED"


def test_http_is_turned_to_https_and_only_the_domain_gets_through(template: Template) -> None:
    listeners = {
        one["Properties"]["Port"]: one["Properties"] for one in template.of_type("ElasticLoadBalancingV2::Listener").values()
    }
    (plain,) = listeners[80]["DefaultActions"]
    assert plain["RedirectConfig"]["Protocol"] == "HTTPS"
    assert listeners[443]["SslPolicy"].startswith("ELBSecurityPolicy-TLS13-1-2")
    assert [action["Type"] for action in listeners[443]["DefaultActions"]] == ["fixed-response"]
    rule = server(template, "ElasticLoadBalancingV2::ListenerRule")
    assert [condition["HostHeaderConfig"]["Values"] for condition in rule["Conditions"]] == [[DOMAIN]]
    assert [action["Type"] for action in rule["Actions"]] == ["forward"]
    assert server(template, "CertificateManager::Certificate")["DomainName"] == DOMAIN
    assert server(template, "Route53::RecordSet")["Name"] == f"{DOMAIN}."


def test_nothing_asks_the_database_whether_the_task_is_healthy(template: Template) -> None:
    """Label Studio asks its database before it answers anything: such a check would keep it awake for $44 a month."""
    targets = server(template, "ElasticLoadBalancingV2::TargetGroup")
    assert (targets["HealthCheckPath"], targets["Port"]) == ("/nginx_health", 8085)
    check = container(template, "app")["HealthCheck"]
    assert "create_connection(('127.0.0.1', 8000)" in check["Command"][1]
    assert "http" not in check["Command"][1]
    nginx = container(template, "nginx")
    assert nginx["DependsOn"] == [{"Condition": "HEALTHY", "ContainerName": "app"}], "else it answers before migrations are done"
    service = server(template, "ECS::Service")
    assert service["LoadBalancers"][0]["ContainerName"] == "nginx"
    patience = check["StartPeriod"] + check["Interval"] * check["Retries"]
    assert service["HealthCheckGracePeriodSeconds"] >= patience == 600


def test_a_deployment_that_fails_is_taken_back_and_none_interrupts(template: Template) -> None:
    deployment = server(template, "ECS::Service")["DeploymentConfiguration"]
    assert deployment["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
    assert (deployment["MinimumHealthyPercent"], deployment["MaximumPercent"]) == (100, 200)


def test_the_image_is_the_version_that_everything_is_tested_against(template: Template) -> None:
    assert {container(template, name)["Image"] for name in ("app", "nginx")} == {IMAGE}
    assert IMAGE.rpartition(":")[2] == LABEL_STUDIO.rpartition("==")[2]


def test_the_database_sleeps_is_encrypted_and_cannot_be_deleted_by_a_slip(template: Template) -> None:
    cluster = template.only("RDS::DBCluster")
    properties = cluster["Properties"]
    assert properties["ServerlessV2ScalingConfiguration"] == {"MinCapacity": 0, "MaxCapacity": 2, "SecondsUntilAutoPause": 300}
    assert properties["StorageEncrypted"] is True
    assert properties["DeletionProtection"] is True
    assert properties["BackupRetentionPeriod"] == 14
    assert cluster["DeletionPolicy"] == cluster["UpdateReplacePolicy"] == "Snapshot"
    assert environment(template)["PGSSLMODE"] == "require"
    manifest = json.loads((template.folder / "manifest.json").read_text())
    assert manifest["artifacts"]["labelloop-prod-label-studio"]["properties"]["terminationProtection"] is True


def test_what_holds_data_keeps_its_name_and_outlives_the_stack(template: Template) -> None:
    """Another logical id would make CloudFormation begin anew with an empty one."""
    for id in ("DatabaseSecret86DBB7B3", "AdminC75D2A91", "SigningKeyEEFC2790", "MediaA721A567"):
        resource = template.resources[id]
        assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")
    assert template.resources["DatabaseB269D8BB"]["Type"] == "AWS::RDS::DBCluster"
    holding = {id for kind in ("S3::Bucket", "RDS::DBCluster", "SecretsManager::Secret") for id in template.of_type(kind)}
    assert len(holding) == 5


def test_media_are_private_and_shown_to_browsers_of_the_domain(template: Template) -> None:
    media = server(template, "S3::Bucket")
    assert set(media["PublicAccessBlockConfiguration"].values()) == {True}
    assert media["VersioningConfiguration"] == {"Status": "Enabled"}
    (rule,) = media["CorsConfiguration"]["CorsRules"]
    assert rule["AllowedOrigins"] == [f"https://{DOMAIN}"]
    told = environment(template)
    assert told["STORAGE_TYPE"] == "s3"
    assert told["STORAGE_AWS_BUCKET_NAME"] == {"Ref": id_of(template, "S3::Bucket", "Media")}
    assert not [name for name in told if "ACCESS_KEY" in name], "the task's role signs"


def test_every_secret_comes_from_secrets_manager(template: Template, with_label_studio: dict[str, Template]) -> None:
    secrets = {entry["Name"]: flat(entry["ValueFrom"]) for entry in container(template, "app")["Secrets"]}
    assert set(secrets) == {"POSTGRE_PASSWORD", "LABEL_STUDIO_PASSWORD", "LABEL_STUDIO_USER_TOKEN", "SECRET_KEY"}
    token = id_of(with_label_studio["state"], "SecretsManager::Secret", "SecretsLabelStudio")
    assert token in secrets["LABEL_STUDIO_USER_TOKEN"]
    assert secrets["LABEL_STUDIO_USER_TOKEN"].endswith(":token::")
    assert not set(secrets) & set(environment(template))
    for secret in template.of_type("SecretsManager::Secret").values():
        generated = secret["Properties"]["GenerateSecretString"]
        assert generated["PasswordLength"] >= 30
        assert "SecretString" not in secret["Properties"]


def test_label_studio_is_told_what_the_loop_needs(template: Template) -> None:
    told = environment(template)
    wanted = {
        "DJANGO_DB": "default",
        "LABEL_STUDIO_HOST": f"https://{DOMAIN}",
        "CSRF_TRUSTED_ORIGINS": f"https://{DOMAIN}",
        "SESSION_COOKIE_SECURE": "1",
        "CSRF_COOKIE_SECURE": "1",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_USERNAME": "admin@example.org",
        "ML_TIMEOUT_HEALTH": "10",
        "ML_TIMEOUT_SETUP": "15",
        "COLLECT_ANALYTICS": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "LATEST_VERSION_CHECK": "false",
    }
    assert wanted.items() <= told.items()
    # What opens a server to its own network is the laptop's alone.
    assert not {"ML_BLOCK_LOCAL_IP", "SSRF_PROTECTION_ENABLED"} & told.keys()


def test_the_task_reads_images_writes_media_and_nothing_else(template: Template) -> None:
    media = f"<{id_of(template, 'S3::Bucket', 'Media')}.Arn>"
    (images,) = {resource for action, resource in granted(template, "TaskRole") if "Images" in resource and "/" not in resource}
    assert granted(template, "TaskRole") == {
        *((f"s3:{action}Object", f"{media}/media/*") for action in ("Get", "Put", "Delete")),
        ("s3:AbortMultipartUpload", f"{media}/media/*"),
        ("s3:ListBucket", media),
        ("s3:GetObject", f"{images}/images/*"),
        ("s3:ListBucket", images),
    }


def test_who_starts_the_task_reads_its_secrets_and_writes_its_log(template: Template) -> None:
    actions = {action for action, _ in granted(template, "TaskExecutionRole")}
    assert actions == {
        "logs:CreateLogStream",
        "logs:PutLogEvents",
        "secretsmanager:DescribeSecret",
        "secretsmanager:GetSecretValue",
    }
    assert not [resource for _, resource in granted(template, "TaskExecutionRole") if "*" in resource]


def test_an_alarm_rings_when_no_task_answers(template: Template) -> None:
    alarm = server(template, "CloudWatch::Alarm")
    (down,) = (metric for metric in alarm["Metrics"] if "Expression" in metric)
    (healthy,) = (metric["MetricStat"] for metric in alarm["Metrics"] if "MetricStat" in metric)
    assert (down["Expression"], alarm["Threshold"]) == ("IF(FILL(healthy, 0) < 1, 1, 0)", 1), "no figure at all is none, too"
    assert (healthy["Metric"]["MetricName"], healthy["Stat"], healthy["Period"]) == ("HealthyHostCount", "Maximum", 900)
    assert alarm["AlarmDescription"].endswith("docs/operations.md#label-studio-down")
    assert [flat(action).rpartition(":")[2] for action in alarm["AlarmActions"]] == ["labelloop-prod-alarms"]


def test_logs_end_with_the_stages_retention(template: Template) -> None:
    assert server(template, "Logs::LogGroup")["RetentionInDays"] == 30


def built(folder: Path, **facts: Any) -> Template:
    app = new_app(context_of(folder, **{"label_studio_url": None, **facts}), folder / "out")
    infra_cdk.app.build(app)
    (found,) = (stack for stack in app.synth().stacks if stack.stack_name == "labelloop-prod-label-studio")
    return Template(found.template, folder / "out")


def test_a_certificate_and_a_name_of_ones_own(tmp_path: Path) -> None:
    own = {"domain": DOMAIN, "admin_email": "admin@example.org", "certificate": CERTIFICATE, "size": "medium"}
    template = built(tmp_path, label_studio=own, account="123456789012", region="eu-west-1")
    assert not template.of_type("CertificateManager::Certificate")
    assert not template.of_type("Route53::RecordSet")
    listeners = [one["Properties"] for one in template.of_type("ElasticLoadBalancingV2::Listener").values()]
    assert [one["Certificates"] for one in listeners if one["Port"] == 443] == [[{"CertificateArn": CERTIFICATE}]]
    assert set(template.outputs) == {"LabelStudioBalancer", "LabelStudioAdminSecret", "LabelStudioService"}
    task = server(template, "ECS::TaskDefinition")
    assert (task["Cpu"], task["Memory"]) == ("1024", "4096")
    assert environment(template)["UWSGI_PROCESSES"] == "4"
    manifest = json.loads((template.folder / "manifest.json").read_text())
    assert "missing" not in manifest, "a stage with an account and a region asks the account nothing"


def test_a_restored_database_is_the_same_resource_begun_with_a_snapshot(template: Template, tmp_path: Path) -> None:
    restored = built(tmp_path, label_studio={**SERVER, "restored_from": "before-the-upgrade"})
    (before,), (after,) = template.of_type("RDS::DBCluster").items(), restored.of_type("RDS::DBCluster").items()
    assert before[0] == after[0]
    properties = after[1]["Properties"]
    assert properties["SnapshotIdentifier"] == "before-the-upgrade"
    assert before[1]["Properties"].keys() - properties.keys() == {"MasterUsername", "MasterUserPassword", "DatabaseName"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"domain": f"https://{DOMAIN}"}, "label_studio.domain"),
        ({"domain": "labels.example.com"}, "label_studio.hosted_zone.name"),
        ({"admin_email": "admin"}, "label_studio.admin_email"),
        ({"hosted_zone": None}, "label_studio"),
        ({"certificate": "arn:aws:iam::123456789012:server-certificate/x"}, "label_studio.certificate"),
        ({"size": "huge"}, "label_studio.size"),
        ({"cpu": 4}, "label_studio"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, label_studio={**SERVER, **change})
    assert caught.value.key == f"prod.{key}"


def test_one_label_studio_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove one"):
        built(tmp_path, label_studio=SERVER, label_studio_url="https://labels.example.com")


def test_the_template_has_no_lint(template: Template, tmp_path: Path) -> None:
    file = tmp_path / "label-studio.json"
    file.write_text(json.dumps(template.body))
    program = Path(sys.executable).parent / "cfn-lint"
    command: list[str | Path] = [program, "--regions", "us-east-1", "--format", "parseable", "--", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_bill_stands_apart_and_has_every_resource(with_label_studio: dict[str, Template], prod: Templates) -> None:
    prices, model = PriceTable.read("us-east-1"), ModelConfigs(ROOT / "model_configs")["digits"].config
    names = ("state", "training", "serving", "label-studio")
    resources = {f"labelloop-prod-{name}/{id}": one for name in names for id, one in with_label_studio[name].resources.items()}
    found = cost.report([model], resources, Usage(labels=1000), prices, "prod", "us-east-1")
    assert found.label_studio
    lines = found.label_studio.lines
    assert {id for line in lines for id in line.ids} == {id for id in resources if id.startswith("labelloop-prod-label-studio/")}
    assert not [line for line in found.month.lines for id in line.ids if "/Database" in id or "/Balancer" in id]
    assert all(line.charged_by or not line.cost for line in lines)

    def quantity(unit: str) -> float:
        return sum(line.quantity for line in lines if line.charged_by == unit)

    assert quantity("vCPU hours") == pytest.approx(0.5 * 730)
    assert quantity("GB hours") == pytest.approx(2 * 730)
    assert quantity("ACU hours") == pytest.approx(730 * 330 / 3600 / 2), "an hourly look, five minutes' pause, half a unit"
    addresses = [line.quantity for line in lines if line.page.endswith("public IPv4 addresses")]
    assert sum(addresses) == pytest.approx(3 * 730)
    assert 50 < found.label_studio.total < 75

    without = cost.report(
        [model],
        {f"{i}/{id}": one for i, stack in enumerate(prod) for id, one in stack.resources.items()},
        Usage(labels=1000),
        prices,
        "prod",
        "us-east-1",
    )
    assert without.label_studio is None
    assert found.idle.total < without.idle.total, "the schedule comes more rarely"
