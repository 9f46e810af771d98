"""What differs between a laptop and AWS, and what the app says to wrong values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import aws_cdk as cdk
import pytest
import yaml
from aws_cdk import aws_sqs as sqs

import infra_cdk.app
from infra_cdk.sources import ROOT
from infra_cdk.stage_facts import STAGES, read_facts
from labelloop.errors import ConfigError
from tests.infra.templates import LOCAL_CONTEXT, Template, Templates, context_of, flat, new_app, synthesize

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
EVERY_FUNCTION = {"LABELLOOP_STAGE", "POWERTOOLS_SERVICE_NAME"}
THREADS = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}


def documented_environment() -> dict[str, set[str]]:
    """The table of docs/architecture.md: which function reads which variables."""
    rows = [
        line.strip().strip("|").split("|") for line in ARCHITECTURE.splitlines() if re.match(r"\| (variable|`[A-Z_]+`)", line)
    ]
    names = [cell.strip() for cell in rows[0][1:]]
    table: dict[str, set[str]] = {name: set(EVERY_FUNCTION) for name in names}
    for row in rows[1:]:
        for name, cell in zip(names, row[1:], strict=True):
            if "✓" in cell:
                table[name] |= set(re.findall(r"`([A-Z_]+)`", row[0]))
    for name in ("predict", "predict_part", "prelabel"):
        table[name] |= THREADS
    return table


def documented_outputs() -> dict[str, set[str]]:
    rows = re.findall(r"^\| (state|training|serving) \| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    outputs = {stack: set(re.findall(r"`([A-Za-z]+)`", keys)) for stack, keys in rows}
    outputs["training"] |= {f"{key}DeadLetters" for key in outputs["training"] if key.endswith("Queue")}
    return outputs


def environments(templates: Templates) -> dict[str, set[str]]:
    return {name: set(f["Properties"]["Environment"]["Variables"]) for name, f in templates.functions.items()}


def test_every_function_reads_what_the_architecture_says(prod: Templates) -> None:
    assert environments(prod) == documented_environment()


def test_a_laptop_adds_where_sagemaker_is(local: Templates) -> None:
    expected = documented_environment()
    expected["retrain"].add("AWS_ENDPOINT_URL_SAGEMAKER")
    assert environments(local) == expected
    variables = local.functions["retrain"]["Properties"]["Environment"]["Variables"]
    assert variables["AWS_ENDPOINT_URL_SAGEMAKER"] == "http://127.0.0.1:7000"


def test_the_outputs_are_those_that_the_cli_looks_for(either: Templates) -> None:
    expected = documented_outputs()
    assert set(either.state.outputs) == expected["state"]
    assert set(either.training.outputs) == expected["training"]
    assert set(either.serving.outputs) == expected["serving"]


def test_the_api_address_has_no_slash_at_its_end(prod: Templates) -> None:
    assert re.search(r"^https://<.+>\.execute-api\..*/(v1|<.+>)$", flat(prod.serving.outputs["ApiUrl"]))


def test_nothing_of_the_laptop_is_in_production(prod: Templates) -> None:
    for template in prod:
        text = json.dumps(template.body)
        for word in ("labelloop.sagemaker", "AWS_ENDPOINT_URL", "127.0.0.1", "localhost", "000000000000", '"local"'):
            assert word not in text


def test_functions_run_python_3_13_trace_and_forget_their_logs_after_a_month(either: Templates) -> None:
    for template in (either.training, either.serving):
        groups = template.of_type("Logs::LogGroup")
        assert all(group["Properties"]["RetentionInDays"] <= 31 for group in groups.values())
        for function in template.of_type("Lambda::Function").values():
            properties = function["Properties"]
            assert properties["Runtime"] == "python3.13"
            assert properties["Handler"] == "handler.handler"
            assert properties["TracingConfig"] == {"Mode": "Active"}
            assert properties["LoggingConfig"]["LogGroup"]["Ref"] in groups
    for function in either.functions.values():
        assert function["Properties"].get("Architectures", ["x86_64"]) in (["x86_64"], ["arm64"])


def test_production_runs_on_what_its_layers_are_built_for(prod: Templates) -> None:
    assert {f["Properties"]["Architectures"][0] for f in prod.functions.values()} == {"x86_64"}


def test_adding_a_folder_is_all_it_takes_to_serve_another_model(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in ("digits", "letters"):
        shutil.copytree(ROOT / "model_configs" / "digits", models / name)
    config = models / "letters" / "config.yaml"
    config.write_text(
        config.read_text().replace("name: digits", "name: letters", 1).replace("memory_mb: 1769", "memory_mb: 3000")
    )
    templates = synthesize({**context_of(tmp_path), "model_configs": str(models)}, tmp_path / "out")
    secrets = {s["Properties"]["Name"] for s in templates.state.of_type("SecretsManager::Secret").values()}
    assert {"labelloop/prod/backend/digits", "labelloop/prod/backend/letters"} <= secrets
    assert templates.serving.functions["predict"]["Properties"]["MemorySize"] == 3000
    assert templates.training.functions["promote"]["Properties"]["MemorySize"] == 3000, "it unpacks what predict loads"
    layers = [p for p in templates.serving.folder.glob("asset.*/python/model_configs/letters/*") if p.is_file()]
    assert {p.name for p in layers} == {"config.yaml", "labeling_template.xml"}


@pytest.mark.parametrize(
    ("context", "key"),
    [
        ({"stage": "Prod"}, "stage"),
        ({"stage": "a-b"}, "stage"),
        ({"stage": "nowhere"}, "nowhere"),
        ({**LOCAL_CONTEXT, "mlflow_url": ""}, "mlflow_url"),
        ({**LOCAL_CONTEXT, "sagemaker_endpoint": ""}, "sagemaker_endpoint"),
        ({**LOCAL_CONTEXT, "label_studio_url": "label.example.org"}, "label_studio_url"),
        ({"stage": "prod", "sagemaker_endpoint": "http://127.0.0.1:1"}, "sagemaker_endpoint"),
        ({"stage": "prod", "label_studio_url": "https://label.example.org"}, "label_studio_url"),
        ({"stage": "prod", "predict_start": "snapshot"}, "predict_start"),
        ({**LOCAL_CONTEXT, "stag": "prod"}, "stag"),
    ],
)
def test_a_wrong_context_value_is_named(context: dict[str, str], key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        infra_cdk.app.build(new_app(context, tmp_path))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("facts", "key", "says"),
    [
        ({"regoin": "eu-west-1"}, "prod", "unknown key 'regoin'; did you mean 'region'?"),
        ({"account": 123456789012}, "prod.account", "put it in quotes"),
        ({"account": "12"}, "prod.account", "matching regex"),
        ({"region": "Ireland"}, "prod.region", "matching regex"),
        ({"label_studio_url": "label.example.org"}, "prod.label_studio_url", "is no http(s) address"),
        ({"mlflow": "yes"}, "prod.mlflow", "is neither app nor an http(s) address"),
        ({"alarms_email": "everybody"}, "prod.alarms_email", "is no e-mail address"),
        ({"reserved_concurrency": "no"}, "prod.reserved_concurrency", "Expected `bool`, got `str`"),
        ({"predict_start": "warm"}, "prod.predict_start", "Invalid enum value 'warm'"),
        ({"predict_start": 0}, "prod.predict_start", ">= 1"),
        ({"deployment": "at-once"}, "prod.deployment", "Invalid enum value 'at-once'"),
        ({"retention": {"log_days": 31}}, "prod.retention.log_days", "Invalid enum value 31"),
        ({"retention": {"days": 31}}, "prod.retention", "unknown key 'days'"),
        ({"training_network": {"subnets": ["subnet-1"]}}, "prod.training_network", "'security_groups' is missing"),
        ({"workflows": {}}, "prod.workflows", "the key 'repository' is missing; add it"),
    ],
)
def test_a_wrong_fact_is_named_with_its_file_key_and_remedy(facts: dict[str, Any], key: str, says: str, tmp_path: Path) -> None:
    context = context_of(tmp_path, **facts)
    with pytest.raises(ConfigError) as caught:
        infra_cdk.app.build(new_app(context, tmp_path / "out"))
    assert (caught.value.where, caught.value.key) == (context["stages"], key)
    assert says in str(caught.value)


def test_a_stages_file_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    for text, says in (("- prod\n", "has no stages"), ("prod: [\n", "is not valid YAML"), ("a: {}\na: {}\n", "stands twice")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_facts("prod", file)
    with pytest.raises(ConfigError, match="no such file"):
        read_facts("prod", tmp_path / "none.yaml")
    file.write_text("dev: {}\nprod: {}\n")
    with pytest.raises(ConfigError, match="name one of: dev, prod"):
        read_facts("production", file)


@pytest.mark.parametrize("stage", sorted(yaml.safe_load(STAGES.read_text())))
def test_each_stage_of_the_repository_can_be_synthesized_without_an_account(stage: str, tmp_path: Path) -> None:
    """By its real entry in stages.yaml; cdk-nag would stop it."""
    app = new_app({"stage": stage}, tmp_path)
    facts = infra_cdk.app.build(app).facts
    stacks = app.synth().stacks
    assert {stack.environment.account for stack in stacks} == {facts.account or "unknown-account"}
    assert {stack.environment.region for stack in stacks} == {facts.region or "unknown-region"}


def test_facts_reach_the_templates(tmp_path: Path) -> None:
    facts = {"account": "123456789012", "region": "eu-west-1", "retention": {"log_days": 7, "replaced_objects_days": 5}}
    templates = synthesize(context_of(tmp_path, **facts), tmp_path / "out")
    for template in (templates.training, templates.serving):
        assert {group["Properties"]["RetentionInDays"] for group in template.of_type("Logs::LogGroup").values()} == {7}
    for bucket in templates.state.of_type("S3::Bucket").values():
        rules = {rule["Id"]: rule for rule in bucket["Properties"]["LifecycleConfiguration"]["Rules"]}
        assert rules["replaced-and-unfinished"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 5
    manifest = json.loads((templates.state.folder / "manifest.json").read_text())
    assert manifest["artifacts"]["labelloop-prod-state"]["environment"] == "aws://123456789012/eu-west-1"


def test_a_model_whose_jobs_could_not_be_named_is_refused(tmp_path: Path) -> None:
    name = "a" * 32
    shutil.copytree(ROOT / "model_configs" / "digits", tmp_path / "models" / name)
    config = tmp_path / "models" / name / "config.yaml"
    config.write_text(config.read_text().replace("name: digits", f"name: {name}", 1))
    with pytest.raises(ConfigError, match="too long"):
        infra_cdk.app.build(new_app({**LOCAL_CONTEXT, "model_configs": str(tmp_path / "models")}, tmp_path / "out"))


def test_a_wrong_model_config_stops_the_command_with_its_own_words(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "model_configs" / "digits", tmp_path / "digits")
    config = tmp_path / "digits" / "config.yaml"
    config.write_text(config.read_text().replace("epochs:", "epoch:"))
    # PATH leads to no Node: the one that comes with the project is used.
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "CDK_CONTEXT_JSON": json.dumps({"model_configs": str(tmp_path)})}
    done = subprocess.run(
        [sys.executable, "-m", "infra_cdk.app"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "config.yaml: hyperparameters: unknown key 'epoch'; did you mean 'epochs'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_production_is_checked_by_cdk_nag(tmp_path: Path) -> None:
    """The fixture `prod` was synthesized, so nothing was found there; here is something to find."""
    app = new_app(context_of(tmp_path), tmp_path / "out")
    infra_cdk.app.build(app)
    sqs.Queue(cdk.Stack(app, "open"), "Queue")
    with pytest.raises(RuntimeError, match="AwsSolutions-SQS4"):
        app.synth()


def test_each_rule_that_is_not_followed_stands_in_the_documentation_with_its_reason(
    prod: Templates, with_label_studio: dict[str, Template], tmp_path: Path
) -> None:
    network = {"subnets": ["subnet-1"], "security_groups": ["sg-1"]}
    rest = context_of(
        tmp_path, mlflow="https://mlflow.example.org", training_network=network, workflows={"repository": "acme/labels"}
    )
    app = new_app(rest, tmp_path / "out")
    infra_cdk.app.build(app)
    app.synth()
    done = set()
    folders = (prod.state.folder, with_label_studio["state"].folder, tmp_path / "out")
    for file in [file for folder in folders for file in folder.glob("*.metadata.json")]:
        for entries in json.loads(file.read_text()).values():
            for entry in entries:
                if entry["type"] == "aws:cdk:acknowledged-rules":
                    done |= {(rule.removeprefix("Annotation::").partition("[")[0], why) for rule, why in entry["data"].items()}
    done = {(rule, why) for rule, why in done if rule.startswith("AwsSolutions-")}  # the CDK acknowledges some of its own
    documented = re.findall(r"^\| (AwsSolutions-\w+) \| (.+) \|$", SECURITY, re.MULTILINE)
    assert sorted(done) == sorted(documented)


def test_templates_have_no_lint(prod: Templates, tmp_path: Path) -> None:
    files = []
    for number, template in enumerate(prod):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(template.body))
    program = Path(sys.executable).parent / "cfn-lint"
    options = ["--regions", "us-east-1", "--format", "parseable", "--ignore-checks", "W3005"]  # CDK names dependencies twice
    command: list[str | Path] = [program, *options, "--", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_documentation_says_what_a_laptop_leaves_out(local: Templates, tmp_path: Path) -> None:
    """The table of docs/architecture.md, against a laptop's stacks and a stage of AWS that has all there is."""
    app = new_app(context_of(tmp_path, predict_start="snapshot", workflows={"repository": "acme/labels"}), tmp_path / "out")
    infra_cdk.app.build(app)
    aws = {resource["Type"] for stack in app.synth().stacks for resource in stack.template["Resources"].values()}
    laptop = {resource["Type"] for template in local for resource in template.resources.values()}
    table = ARCHITECTURE[ARCHITECTURE.index("### What the emulator deploys") :].partition("\nTraining jobs,")[0]
    deployed, left_out = (
        {
            f"AWS::{service.strip()}::{name}"
            for service, *cells in (row.strip("|").split("|") for row in table.splitlines() if row.startswith("| "))
            for name in re.findall(r"`([A-Z]\w+)`", cells[column])
        }
        for column in (0, 1)
    )
    assert (deployed, left_out) == (laptop, aws - laptop)
