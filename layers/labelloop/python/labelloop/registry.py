"""MLflow's model registry over REST: aliases and tags.

mlflow's own client weighs 69 MB at the least, waits 120 s and retries: not for a Lambda.
"""

from __future__ import annotations

from typing import Any

import msgspec
import urllib3

from labelloop.errors import RegistryError

_TIMEOUT = urllib3.Timeout(connect=3, read=10)  # s
_RETRIES = urllib3.Retry(
    total=3, connect=3, read=1, status=2, backoff_factor=0.3, backoff_jitter=0.3, status_forcelist=(502, 503, 504),
    allowed_methods=None, raise_on_status=False,
)  # fmt: skip


class Registry:
    """A model registry. `tracking_uri` is an MLflow server's address, or the ARN of a SageMaker MLflow App.

    Methods raise `RegistryError`; repeating them is harmless.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._app = tracking_uri if tracking_uri.startswith("arn:") else None
        region = tracking_uri.split(":")[3] if self._app else ""
        self._url = f"https://mlflow.sagemaker.{region}.app.aws" if self._app else tracking_uri.rstrip("/")
        self._region = region
        self._http = urllib3.PoolManager(timeout=_TIMEOUT, retries=_RETRIES)

    def set_alias(self, model: str, alias: str, version: int) -> None:
        self._call("POST", "registered-models/alias", {"name": model, "alias": alias, "version": str(version)})

    def tag(self, model: str, version: int, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            self._call("POST", "model-versions/set-tag", {"name": model, "version": str(version), "key": key, "value": value})

    def _call(self, method: str, path: str, body: dict[str, Any]) -> None:
        url = f"{self._url}/api/2.0/mlflow/{path}"
        content = msgspec.json.encode(body)
        headers = {"Content-Type": "application/json", **self._signature(method, url, content)}
        try:
            answer = self._http.request(method, url, body=content, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise RegistryError(f"MLflow at {self._url} does not answer: {error}") from error
        if answer.status != 200:
            text = answer.data[:300].decode(errors="replace")
            raise RegistryError(f"MLflow answered {path} with {answer.status}: {text}", status=answer.status)

    def _signature(self, method: str, url: str, content: bytes) -> dict[str, str]:
        """SigV4 headers for an MLflow App; none for a plain server."""
        if self._app is None:
            return {}
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.session import Session

        request = AWSRequest(method, url, data=content, headers={"x-sm-mlflow-app-arn": self._app})
        credentials = Session().get_credentials()
        if credentials is None:
            raise RegistryError("there are no AWS credentials to sign a request to the MLflow App with")
        SigV4Auth(credentials, "sagemaker", self._region).add_auth(request)
        return dict(request.headers.items())
