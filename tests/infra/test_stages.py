"""What differs between a laptop and AWS, and what the app says to wrong values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import aws_cdk as cdk
import pytest
from aws_cdk import aws_sqs as sqs

import infra_cdk.app
from infra_cdk.sources import ROOT
from labelloop.errors import ConfigError
from tests.infra.templates import LOCAL_CONTEXT, PROD_CONTEXT, Templates, flat, new_app, synthesize

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
EVERY_FUNCTION = {"LABELLOOP_STAGE", "POWERTOOLS_SERVICE_NAME", "POWERTOOLS_LOG_LEVEL"}
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
    outputs["training"] |= {f"{key}DeadLetters" for key in outputs["training"]}
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
    templates = synthesize({**PROD_CONTEXT, "model_configs": str(models)}, tmp_path / "out")
    secrets = {s["Properties"]["Name"] for s in templates.state.of_type("SecretsManager::Secret").values()}
    assert {"labelloop/prod/backend/digits", "labelloop/prod/backend/letters"} <= secrets
    assert templates.serving.functions["predict"]["Properties"]["MemorySize"] == 3000
    layers = [p for p in templates.serving.folder.glob("asset.*/python/model_configs/letters/*") if p.is_file()]
    assert {p.name for p in layers} == {"config.yaml", "labeling_template.xml"}


def test_an_unchanged_tree_gives_unchanged_templates(prod: Templates, tmp_path: Path) -> None:
    again = synthesize(PROD_CONTEXT, tmp_path)
    assert [t.body for t in again] == [t.body for t in prod]


@pytest.mark.parametrize(
    ("context", "key"),
    [
        ({"stage": "Prod"}, "stage"),
        ({"stage": "a-b"}, "stage"),
        ({**LOCAL_CONTEXT, "mlflow_url": ""}, "mlflow_url"),
        ({**LOCAL_CONTEXT, "sagemaker_endpoint": ""}, "sagemaker_endpoint"),
        ({**PROD_CONTEXT, "sagemaker_endpoint": "http://127.0.0.1:1"}, "sagemaker_endpoint"),
        ({**PROD_CONTEXT, "label_studio_url": "label.example.org"}, "label_studio_url"),
        ({**PROD_CONTEXT, "reserved_concurrency": "10"}, "reserved_concurrency"),
        ({**PROD_CONTEXT, "predict_start": "warm"}, "predict_start"),
        ({**PROD_CONTEXT, "predict_start": "0"}, "predict_start"),
        ({**LOCAL_CONTEXT, "predict_start": "snapshot"}, "predict_start"),
    ],
)
def test_a_wrong_context_value_is_named(context: dict[str, str], key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        infra_cdk.app.build(new_app(context, tmp_path))
    assert caught.value.key == key


def test_a_model_whose_jobs_could_not_be_named_is_refused(tmp_path: Path) -> None:
    name = "a" * 32
    shutil.copytree(ROOT / "model_configs" / "digits", tmp_path / "models" / name)
    config = tmp_path / "models" / name / "config.yaml"
    config.write_text(config.read_text().replace("name: digits", f"name: {name}", 1))
    with pytest.raises(ConfigError, match="too long"):
        infra_cdk.app.build(new_app({"stage": "production", "model_configs": str(tmp_path / "models")}, tmp_path / "out"))


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
    app = new_app(PROD_CONTEXT, tmp_path)
    infra_cdk.app.build(app)
    sqs.Queue(cdk.Stack(app, "open"), "Queue")
    with pytest.raises(RuntimeError, match="AwsSolutions-SQS4"):
        app.synth()


def test_each_rule_that_is_not_followed_stands_in_the_documentation_with_its_reason(prod: Templates) -> None:
    done = set()
    for file in prod.state.folder.glob("*.metadata.json"):
        for entries in json.loads(file.read_text()).values():
            for entry in entries:
                if entry["type"] == "aws:cdk:acknowledged-rules":
                    done |= {(rule.removeprefix("Annotation::").partition("[")[0], why) for rule, why in entry["data"].items()}
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
