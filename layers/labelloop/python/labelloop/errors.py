"""Everything that labelloop raises on purpose.

    LabelloopError
    ├── SettingsError            an environment variable or stack output is missing
    ├── ConfigError              config.yaml or labeling_template.xml is wrong: file, key, remedy
    ├── RequestError             a caller sent what no answer exists for (HTTP 400)
    ├── UnknownModelError        no such model (HTTP 404)
    ├── ImageError               an image is missing, broken, too large, or from a place that is not allowed
    ├── TooLargeError            a file is larger than what is read of one
    ├── AnnotationError          an annotation cannot become a training example
    ├── ModelError               a model file is missing, damaged, or not what its record says
    ├── ConflictError            somebody else changed the record first; read again and decide again
    ├── LateError                there was no time left for it
    ├── NotSetUpError            `setup-label-studio-project` has not been run for the model
    └── ServiceError             a service labelloop stands on did not do its part
        ├── LabelStudioError
        ├── RegistryError        MLflow
        │   └── NotRegisteredError   it has no such version, or experiment: somebody deleted it, or it never was there
        ├── StorageError         S3
        ├── TrainingServiceError SageMaker
        └── LocalServiceError    a part of the laptop stack: names the part and its log

Errors of other libraries are translated where the library is called. `http_status` and `exit_code` are the only
places where an error becomes a number.
"""

from __future__ import annotations

from pathlib import Path


class LabelloopError(Exception):
    """Base of the tree; its text is fit for a person to read and says what to do."""


class SettingsError(LabelloopError):
    pass


class ConfigError(LabelloopError):
    """`where` is the file, `key` the dotted path inside it."""

    def __init__(self, where: str | Path, message: str, key: str = "") -> None:
        self.where, self.key = str(where), key
        super().__init__(f"{where}: {f'{key}: ' if key else ''}{message}")


class RequestError(LabelloopError):
    pass


class UnknownModelError(LabelloopError):
    pass


class ImageError(LabelloopError):
    pass


class TooLargeError(LabelloopError):
    """`size` in bytes, as far as it is known."""

    def __init__(self, message: str, size: int) -> None:
        self.size = size
        super().__init__(message)


class AnnotationError(LabelloopError):
    pass


class ModelError(LabelloopError):
    pass


class ConflictError(LabelloopError):
    pass


class LateError(LabelloopError):
    pass


class NotSetUpError(LabelloopError):
    pass


class ServiceError(LabelloopError):
    """`status` is the HTTP status where there was one."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class LabelStudioError(ServiceError):
    pass


class RegistryError(ServiceError):
    pass


class NotRegisteredError(RegistryError):
    pass


class StorageError(ServiceError):
    pass


class TrainingServiceError(ServiceError):
    pass


class LocalServiceError(ServiceError):
    """`part` is what failed, `log` where it says why."""

    def __init__(self, part: str, message: str, log: Path | None = None) -> None:
        self.part, self.log = part, log
        super().__init__(f"{part}: {message}" + (f"\n  log: {log}" if log else ""))


def http_status(error: LabelloopError) -> int:
    """The HTTP status that a caller of the API gets for an error."""
    match error:
        case RequestError() | ImageError() | AnnotationError():
            return 400
        case UnknownModelError():
            return 404
        case ConflictError() | NotSetUpError():
            return 409
        case ServiceError() | LateError():
            return 503
        case _:
            return 500


def exit_code(error: LabelloopError) -> int:
    """The exit code of the `labelloop` command: 2 for what the user can mend, 3 for a service that failed."""
    match error:
        case ServiceError():
            return 3
        case _:
            return 2
