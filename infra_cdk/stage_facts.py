"""stages.yaml: all there is to know of each stage of AWS, its schema and its reader. Imports no CDK, which would start Node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from infra_cdk.sources import ROOT
from labelloop.closed_schema import Section, convert
from labelloop.errors import ConfigError
from labelloop.unique_yaml import read

STAGES = ROOT / "stages.yaml"
LOCAL = "local"  # a laptop's stage, which needs no entry
NAME = re.compile(r"[a-z][a-z0-9]{0,15}")  # no hyphen: job names start with `labelloop-{stage}-`, and no stage may see another's
GITHUB = "https://token.actions.githubusercontent.com"

# GitHub writes `owner@123/name@456` for repositories that were made or renamed since July 2026, Forgejo `owner-123/name-456`.
_REPOSITORY = re.compile(r"[\w.-]+(@\d+)?/[\w.-]+(@\d+)?", re.ASCII)
_PROVIDER = re.compile(r"arn:[\w-]+:iam::\d{12}:oidc-provider/\S+", re.ASCII)
_BRANCH = re.compile(r"[\w./-]+", re.ASCII)
_DOMAIN = re.compile(r"(?!-)[a-z0-9-]+(\.[a-z0-9-]+)+")
_CERTIFICATE = re.compile(r"arn:[\w-]+:acm:[\w-]+:\d{12}:certificate/[\w-]+", re.ASCII)
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")


class Retention(Section, frozen=True, kw_only=True):
    """How long things are kept that nobody asks for any more."""

    log_days: Annotated[Literal[7, 14, 30, 90, 180, 365], Meta(description="days that logs are kept")] = 30
    replaced_objects_days: Annotated[
        int, Meta(ge=1, le=3650, description="days in which an object of S3 that was overwritten or deleted can be brought back")
    ] = 90


class Network(Section, frozen=True, kw_only=True):
    """A VPC's part that training jobs run in, and reach nothing but what it lets them reach."""

    subnets: Annotated[
        list[Annotated[str, Meta(pattern=r"^subnet-[0-9a-f]+$")]], Meta(min_length=1, max_length=16, description="ids of subnets")
    ]
    security_groups: Annotated[
        list[Annotated[str, Meta(pattern=r"^sg-[0-9a-f]+$")]],
        Meta(min_length=1, max_length=5, description="ids of security groups"),
    ]


class HostedZone(Section, frozen=True, kw_only=True):
    """A public hosted zone of Route 53, in the stage's account."""

    id: Annotated[str, Meta(pattern=r"^Z[0-9A-Z]+$", description="as Route 53 shows it")]
    name: Annotated[str, Meta(description="its domain name")]


class LabelStudioServer(Section, frozen=True, kw_only=True):
    """A Label Studio of the stage's own, deployed with it; without this section `label_studio_url` names one."""

    domain: Annotated[str, Meta(description="its name, such as labels.example.com")]
    admin_email: Annotated[str, Meta(description="who signs in first, and administers it; counts at the first start only")]
    hosted_zone: Annotated[
        HostedZone | None,
        Meta(description="where the name is entered, and the certificate proven; without it somebody enters the name by hand"),
    ] = None
    certificate: Annotated[str | None, Meta(description="ARN of one of ACM's for the name; without it the zone gets one")] = None
    size: Annotated[
        Literal["small", "medium", "large"], Meta(description="half a core and 2 GB, one and 4 GB, or four and 8 GB")
    ] = "small"
    restored_from: Annotated[
        str | None,
        Meta(description="the snapshot that the database begins with; it has to stay here, or the next deployment empties it"),
    ] = None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not _DOMAIN.fullmatch(self.domain):
            yield "label_studio.domain", f"{self.domain!r} is no domain name in lower-case letters, without https://"
        if not _EMAIL.fullmatch(self.admin_email):
            yield "label_studio.admin_email", f"{self.admin_email!r} is no e-mail address"
        if self.certificate and not _CERTIFICATE.fullmatch(self.certificate):
            yield "label_studio.certificate", f"{self.certificate!r} is no ARN of a certificate of ACM"
        if not self.certificate and not self.hosted_zone:
            yield "label_studio", "needs hosted_zone, in which a certificate is proven, or the ARN of a certificate"
        if self.hosted_zone and self.domain != self.hosted_zone.name and not self.domain.endswith(f".{self.hosted_zone.name}"):
            yield "label_studio.hosted_zone.name", f"{self.domain} does not lie in {self.hosted_zone.name}"


class Workflows(Section, frozen=True, kw_only=True):
    """Whose workflows AWS lets in; without this section none."""

    repository: Annotated[str, Meta(description="as it stands in the subject of the forge's tokens: owner/name")]
    issuer: Annotated[str, Meta(description="who issues the tokens; a Forgejo's is https://FORGE/api/actions")] = GITHUB
    provider: Annotated[
        str | None, Meta(description="ARN of the account's identity provider for the issuer; without it one is made")
    ] = None
    branch: Annotated[str, Meta(description="the branch that deploys and trains")] = "main"

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not _REPOSITORY.fullmatch(self.repository):
            yield "workflows.repository", f"{self.repository!r} is not owner/name or owner@id/name@id"
        if not self.issuer.startswith("https://") or "*" in self.issuer or self.issuer.endswith("/"):
            yield "workflows.issuer", f"{self.issuer!r} is no https address, or has a slash at its end"
        if self.provider and not _PROVIDER.fullmatch(self.provider):
            yield "workflows.provider", f"{self.provider!r} is no ARN of an OIDC provider"
        if not _BRANCH.fullmatch(self.branch):
            yield "workflows.branch", f"{self.branch!r} is no name of a branch"

    @property
    def on_branch(self) -> str:
        """The subject of a token of the branch."""
        return f"repo:{self.repository}:ref:refs/heads/{self.branch}"

    @property
    def pull_requests(self) -> str:
        """The subject of a token of a pull request. A fork's gets none."""
        return f"repo:{self.repository}:pull_request"


class StageFacts(Section, frozen=True, kw_only=True):
    """A stage of AWS."""

    account: (
        Annotated[str, Meta(pattern=r"^\d{12}$", description="id of the account, in quotes; without it the credentials'")] | None
    ) = None
    region: (
        Annotated[str, Meta(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$", description="such as eu-west-1; without it the credentials'")]
        | None
    ) = None
    label_studio_url: Annotated[str | None, Meta(description="an existing Label Studio, as browsers and functions reach it")] = (
        None
    )
    label_studio: LabelStudioServer | None = None
    mlflow: Annotated[
        str,
        Meta(description="app (SageMaker's serverless MLflow App is made), or a server's address"),
    ] = "app"
    alarms_email: Annotated[str | None, Meta(description="who is told of alarms; AWS asks the address to confirm")] = None
    predict_start: Annotated[
        Literal["cold", "snapshot"] | Annotated[int, Meta(ge=1, le=100)],
        Meta(
            description="cold; snapshot (SnapStart); or how many of predict's environments are kept ready: both cost while idle"
        ),
    ] = "cold"
    deployment: Annotated[
        Literal["canary", "at once"],
        Meta(description="whether a new version of predict gets a tenth of the requests first, or all of them at once"),
    ] = "canary"
    reserved_concurrency: Annotated[
        bool,
        Meta(description="bounds what the API runs; false for an account whose functions may run fewer than 320 times at once"),
    ] = True
    retention: Retention = Retention()
    training_network: Network | None = None
    workflows: Workflows | None = None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """What the schema cannot say: (key, message)."""
        if self.label_studio_url and not is_address(self.label_studio_url):
            yield "label_studio_url", f"{self.label_studio_url!r} is no http(s) address"
        if self.label_studio:
            if self.label_studio_url:
                yield "label_studio_url", "a Label Studio is deployed already, by the section label_studio; remove one of them"
            yield from self.label_studio.contradictions()
        if self.mlflow != "app" and not is_address(self.mlflow):
            yield "mlflow", f"{self.mlflow!r} is neither app nor an http(s) address"
        if self.alarms_email and not _EMAIL.fullmatch(self.alarms_email):
            yield "alarms_email", f"{self.alarms_email!r} is no e-mail address"
        if self.workflows:
            yield from self.workflows.contradictions()


def is_address(text: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def read_facts(stage: str, file: Path = STAGES) -> StageFacts:
    """What the file says of a stage; of a laptop's it need say nothing. Raises `ConfigError`."""
    where = str(file)
    if not NAME.fullmatch(stage):
        raise ConfigError(where, f"{stage!r} is no stage name; use up to 16 lower-case letters and digits", "stage")
    try:
        stages = read(file.read_text(encoding="utf-8"), where=where)
    except FileNotFoundError:
        raise ConfigError(where, "no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(where, f"is not UTF-8 text: {error}") from error
    if not isinstance(stages, dict):
        raise ConfigError(where, "has no stages; write `prod:` and what there is to know of it below")
    if stage not in stages and stage != LOCAL:
        raise ConfigError(where, f"there is no such stage; add it, or name one of: {', '.join(map(str, stages))}", stage)
    facts = convert(stages.get(stage) or {}, StageFacts, where=where, inside=stage)
    for key, problem in facts.contradictions():
        raise ConfigError(where, problem, f"{stage}.{key}")
    return facts
