"""MLflow over REST: the model registry's aliases and tags, and the artifacts of runs that the server itself hands out.

mlflow's own client weighs 69 MB at the least, waits 120 s and retries: not for a Lambda.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import urllib3

from labelloop.errors import NotRegisteredError, RegistryError

_TIMEOUT = urllib3.Timeout(connect=3, read=10)  # s
_RETRIES = urllib3.Retry(
    total=3, connect=3, read=1, status=2, backoff_factor=0.3, backoff_jitter=0.3, status_forcelist=(502, 503, 504),
    allowed_methods=None, raise_on_status=False, respect_retry_after_header=False,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run, named after its job, and the address of its artifacts.

    `served`: the path at which the server itself hands them out; None elsewhere.
    """

    id: str
    name: str
    artifacts: str

    @property
    def served(self) -> str | None:
        scheme, _, path = self.artifacts.partition(":/")
        return path.strip("/") if scheme == "mlflow-artifacts" else None


class Registry:
    """A model registry. `tracking_uri` is an MLflow server's address, or the ARN of a SageMaker MLflow App.

    `token` gives a server's bearer token, empty where it asks for none. `endpoint`: where the App is, when not at AWS.
    Methods raise `RegistryError`, `NotRegisteredError` where a version is not there any more; repeating them is harmless.
    """

    def __init__(self, tracking_uri: str, token: Callable[[], str] | None = None, *, endpoint: str | None = None) -> None:
        self._app = tracking_uri if tracking_uri.startswith("arn:") else None
        self._region = tracking_uri.split(":")[3] if self._app else ""
        address = f"https://mlflow.sagemaker.{self._region}.app.aws" if self._app else tracking_uri
        self._url = (endpoint or address).rstrip("/")
        self._token = token
        self._http = urllib3.PoolManager(timeout=_TIMEOUT, retries=_RETRIES)

    def set_alias(self, model: str, alias: str, version: int) -> None:
        self._call("POST", "registered-models/alias", {"name": model, "alias": alias, "version": str(version)})

    def tag(self, model: str, version: int, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            self._call("POST", "model-versions/set-tag", {"name": model, "version": str(version), "key": key, "value": value})

    def runs_of(self, model: str, digest: str) -> list[Run]:
        """The runs, deleted ones too, that trained on a dataset snapshot."""
        runs = self._runs(model, f"tags.dataset_digest = '{digest}'")
        return [Run(run["info"]["run_id"], run["info"].get("run_name", ""), run["info"]["artifact_uri"]) for run in runs]

    def epoch(self, model: str, job_name: str) -> int | None:
        """The last epoch that a training job has noted; None while it has noted none."""
        runs = self._runs(model, f"tags.job_name = '{job_name}'")
        losses = [int(its.get("step", 0)) for run in runs for its in run["data"].get("metrics", []) if its["key"] == "loss"]
        return max(losses, default=None)

    def _runs(self, model: str, where: str) -> list[dict[str, Any]]:
        try:
            found = self._call("GET", f"experiments/get-by-name?{urlencode({'experiment_name': model}, quote_via=quote)}")
        except RegistryError as error:
            if error.status != 404:
                raise
            return []
        asked = {
            "experiment_ids": [found["experiment"]["experiment_id"]],
            "filter": where,
            "run_view_type": "ALL",
            "max_results": 1000,
        }
        return list(self._call("POST", "runs/search", asked).get("runs", []))

    def artifact(self, path: str) -> bytes | None:
        """A file that the server hands out (`Run.served` and its name), or None when there is none."""
        try:
            return self._send("GET", f"mlflow-artifacts/artifacts/{quote(path)}", b"")
        except RegistryError as error:
            if error.status != 404:
                raise
            return None

    def put_artifact(self, path: str, content: bytes) -> None:
        """Replace such a file."""
        self._send("PUT", f"mlflow-artifacts/artifacts/{quote(path)}", content, "application/octet-stream")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content = b"" if body is None else msgspec.json.encode(body)
        answer = self._send(method, f"mlflow/{path}", content)
        return msgspec.json.decode(answer) if answer else {}

    def _send(self, method: str, path: str, content: bytes, kind: str = "application/json") -> bytes:
        url = f"{self._url}/api/2.0/{path}"
        signed_in = self._signature(method, url, content) if self._app else self._bearer()
        headers = {"Content-Type": kind, **signed_in}
        try:
            answer = self._http.request(method, url, body=content or None, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise RegistryError(f"MLflow at {self._url} does not answer: {error}") from error
        if answer.status != 200:
            text = answer.data[:300].decode(errors="replace")
            what = path.removeprefix("mlflow/")
            refusal = NotRegisteredError if _error_code(answer.data) == "RESOURCE_DOES_NOT_EXIST" else RegistryError
            raise refusal(f"MLflow answered {what} with {answer.status}: {text}", status=answer.status)
        return bytes(answer.data)

    def _bearer(self) -> dict[str, str]:
        token = self._token() if self._token else ""
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _signature(self, method: str, url: str, content: bytes) -> dict[str, str]:
        """SigV4 headers for an MLflow App, the same as those of the plugin sagemaker-mlflow."""
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        headers = {"x-sm-mlflow-app-arn": self._app, "X-Amz-Content-SHA256": hashlib.sha256(content).hexdigest()}
        request = AWSRequest(method, url, data=content, headers=headers)
        SigV4Auth(self._credentials.get_frozen_credentials(), "sagemaker", self._region).add_auth(request)
        return dict(request.headers.items())

    @cached_property
    def _credentials(self) -> Any:
        """They are renewed by themselves."""
        from botocore.session import Session

        credentials = Session().get_credentials()
        if credentials is None:
            raise RegistryError("there are no AWS credentials to sign a request to the MLflow App with")
        return credentials


class _Refusal(msgspec.Struct):
    error_code: str = ""


def _error_code(body: bytes) -> str:
    """MLflow's own; none of what a server before it says."""
    try:
        return msgspec.json.decode(body, type=_Refusal).error_code
    except ValueError:
        return ""
