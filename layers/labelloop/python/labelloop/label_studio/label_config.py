"""Label Studio's label config: which control tag labels which image under which task key."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

from labelloop.errors import ConfigError


@dataclass(frozen=True)
class LabelConfig:
    """The parts of a label config that predictions and annotations name.

    `from_name` is the control tag, `to_name` the Image tag, `data_key` the task's key of the image address.
    """

    from_name: str
    to_name: str
    data_key: str
    labels: tuple[str, ...]

    @classmethod
    def parse(cls, xml: str, *, where: str = "label config") -> LabelConfig:
        """Read a label config with one `<Image>` and one single-choice `<Choices>`. Raises `ConfigError`."""
        try:
            root = ElementTree.fromstring(xml)  # noqa: S314 - a file of the repository
        except ElementTree.ParseError as error:
            raise ConfigError(where, f"is not valid XML: {error}") from error
        images, controls = list(root.iter("Image")), list(root.iter("Choices"))
        if len(images) != 1:
            raise ConfigError(where, f"needs exactly one <Image> tag, has {len(images)}")
        if len(controls) != 1:
            raise ConfigError(where, f"needs exactly one <Choices> tag, has {len(controls)}")
        image, control = images[0], controls[0]
        if control.get("choice", "single") not in ("single", "single-radio"):
            raise ConfigError(where, f'<Choices choice="{control.get("choice")}"> takes several classes; write choice="single"')
        to_name, from_name, value = image.get("name", ""), control.get("name", ""), image.get("value", "")
        if not from_name:
            raise ConfigError(where, "<Choices> has no name")
        if not to_name or control.get("toName") != to_name:
            raise ConfigError(where, f'<Choices toName="{control.get("toName")}"> does not name the <Image>')
        if not value.startswith("$"):
            raise ConfigError(where, f'<Image value="{value}"> does not name a task key, such as "$image"')
        labels = tuple(choice.get("value", "") for choice in control.iter("Choice"))
        if not all(labels) or len(set(labels)) != len(labels):
            raise ConfigError(where, "every <Choice> needs a value of its own")
        return cls(from_name=from_name, to_name=to_name, data_key=value.removeprefix("$"), labels=labels)
