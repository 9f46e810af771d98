"""The state stack: nothing that holds data is public, unencrypted, unversioned or deleted with the stack."""

from __future__ import annotations

import json

import pytest

from tests.infra.templates import Template, Templates, flat

HOLDS_DATA = ("S3::Bucket", "DynamoDB::Table", "SecretsManager::Secret", "Events::EventBus", "SageMaker::MlflowApp")


def images_of(state: Template) -> dict[str, object]:
    (name,) = (name for name in state.of_type("S3::Bucket") if name.startswith("Images"))
    return dict(state.resources[name]["Properties"])


def test_buckets_are_private_encrypted_and_versioned(either: Templates) -> None:
    buckets = either.state.of_type("S3::Bucket")
    assert len(buckets) >= 2
    for bucket in buckets.values():
        properties = bucket["Properties"]
        assert set(properties["PublicAccessBlockConfiguration"].values()) == {True}
        assert len(properties["PublicAccessBlockConfiguration"]) == 4
        rules = properties["BucketEncryption"]["ServerSideEncryptionConfiguration"]
        assert [rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] for rule in rules] == ["AES256"]
        assert properties["VersioningConfiguration"] == {"Status": "Enabled"}
        lifecycle = properties["LifecycleConfiguration"]["Rules"]
        assert any(rule.get("NoncurrentVersionExpiration") for rule in lifecycle)


def test_buckets_refuse_what_comes_without_tls(either: Templates) -> None:
    state = either.state
    for name in state.of_type("S3::Bucket"):
        policy = state.only("S3::BucketPolicy", Bucket={"Ref": name})["Properties"]["PolicyDocument"]
        denied = [s for s in policy["Statement"] if s["Effect"] == "Deny" and s["Principal"] == {"AWS": "*"}]
        assert {"Bool": {"aws:SecureTransport": "false"}} in [statement["Condition"] for statement in denied]
        assert all(statement["Action"] == "s3:*" for statement in denied)


def test_what_holds_data_outlives_the_stack(either: Templates) -> None:
    """But not a creation that is taken back: the next attempt would find its names taken."""
    kept = [r for kind in HOLDS_DATA for r in either.state.of_type(kind).values()]
    assert len(kept) >= 6
    for resource in kept:
        assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")


def test_images_announce_themselves(either: Templates) -> None:
    images = images_of(either.state)
    assert images["NotificationConfiguration"] == {"EventBridgeConfiguration": {"EventBridgeEnabled": True}}


def test_label_studio_may_load_images_in_a_browser(prod: Templates) -> None:
    (rule,) = images_of(prod.state)["CorsConfiguration"]["CorsRules"]  # type: ignore[index]
    assert rule["AllowedOrigins"] == ["https://label.example.org"]
    assert sorted(rule["AllowedMethods"]) == ["GET", "HEAD"]


def test_what_can_be_made_again_does_not_stay_for_ever(either: Templates) -> None:
    rules = [
        rule
        for bucket in either.state.of_type("S3::Bucket").values()
        for rule in bucket["Properties"]["LifecycleConfiguration"]["Rules"]
        if "ExpirationInDays" in rule
    ]
    assert [rule["Prefix"] for rule in rules] == ["checkpoints/", "cache/"]  # and nothing else expires


def test_the_ledger_is_on_demand_and_can_be_restored(either: Templates) -> None:
    ledger = either.state.only("DynamoDB::Table")["Properties"]
    assert ledger["BillingMode"] == "PAY_PER_REQUEST"
    assert ledger["PointInTimeRecoverySpecification"]["PointInTimeRecoveryEnabled"] is True
    assert [(key["AttributeName"], key["KeyType"]) for key in ledger["KeySchema"]] == [("model", "HASH"), ("record", "RANGE")]


def test_a_models_password_is_generated_and_fit_for_basic_auth(prod: Templates) -> None:
    secret = prod.state.only("SecretsManager::Secret", Name="labelloop/prod/backend/digits")["Properties"]
    generated = secret["GenerateSecretString"]
    assert json.loads(generated["SecretStringTemplate"]) == {"username": "digits"}
    assert generated["GenerateStringKey"] == "password"
    assert generated["ExcludePunctuation"] is True
    assert generated["PasswordLength"] >= 32


def test_label_studios_token_is_a_placeholder_that_says_so(prod: Templates) -> None:
    secret = prod.state.only("SecretsManager::Secret", Name="labelloop/prod/label-studio")["Properties"]
    assert "not filled in" in json.loads(secret["SecretString"])["token"]


def test_mlflow_is_serverless_where_none_is_given(prod: Templates) -> None:
    app = prod.state.only("SageMaker::MlflowApp")
    uri = prod.state.outputs["MlflowTrackingUri"]
    assert uri == {"Fn::GetAtt": [prod.state.id_of(app), "Arn"]}
    assert flat(app["Properties"]["ArtifactStoreUri"]).startswith("s3://")


def test_mlflow_is_the_users_own_where_one_is_given(local: Templates) -> None:
    assert not local.state.of_type("SageMaker::MlflowApp")
    assert local.state.outputs["MlflowTrackingUri"] == "http://127.0.0.1:5000"


@pytest.mark.parametrize("stage", ["prod", "local"])
def test_only_production_is_protected_from_a_slip(stage: str, request: pytest.FixtureRequest) -> None:
    templates: Templates = request.getfixturevalue(stage)
    manifest = json.loads((templates.state.folder / "manifest.json").read_text())
    protected = manifest["artifacts"][f"labelloop-{stage}-state"]["properties"].get("terminationProtection", False)
    assert protected is (stage == "prod")
