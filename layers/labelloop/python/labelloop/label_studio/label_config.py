"""Label Studio's label config: which control tag labels which image under which task key."""

from __future__ import annotations

from typing import NamedTuple
from xml.etree import ElementTree

from labelloop.errors import ConfigError


class Control(NamedTuple):
    """The control tag that a problem type is annotated with, and the attribute that it cannot do without.

    An absent attribute counts as Label Studio's `default`.
    """

    tag: str
    item: str  # the tag of a class inside it
    attribute: str
    allowed: tuple[str, ...]
    default: str
    otherwise: str  # what any other value would let annotators do


class LabelConfig(NamedTuple):
    """The parts of a label config that predictions and annotations name.

    `from_name` is the control tag, `to_name` the Image tag, `data_key` the task's key of the image address.
    """

    from_name: str
    to_name: str
    data_key: str
    labels: tuple[str, ...]

    @classmethod
    def parse(cls, xml: str, control: Control, *, where: str = "label config") -> LabelConfig:
        """Read a label config with one `<Image>` and one tag of `control`'s kind. Raises `ConfigError`."""
        try:
            root = ElementTree.fromstring(xml)  # noqa: S314 - a file of the repository
        except ElementTree.ParseError as error:
            raise ConfigError(where, f"is not valid XML: {error}") from error
        images, controls = list(root.iter("Image")), list(root.iter(control.tag))
        if len(images) != 1:
            raise ConfigError(where, f"needs exactly one <Image> tag, has {len(images)}")
        if len(controls) != 1:
            raise ConfigError(where, f"needs exactly one <{control.tag}> tag, has {len(controls)}")
        image, found = images[0], controls[0]
        setting = found.get(control.attribute, control.default)
        if setting not in control.allowed:
            raise ConfigError(
                where,
                f'<{control.tag} {control.attribute}="{setting}"> {control.otherwise}; '
                f'write {control.attribute}="{control.allowed[0]}"',
            )
        to_name, from_name, value = image.get("name", ""), found.get("name", ""), image.get("value", "")
        if not from_name:
            raise ConfigError(where, f"<{control.tag}> has no name")
        if not to_name or found.get("toName") != to_name:
            raise ConfigError(where, f'<{control.tag} toName="{found.get("toName")}"> does not name the <Image>')
        if not value.startswith("$"):
            raise ConfigError(where, f'<Image value="{value}"> does not name a task key, such as "$image"')
        labels = tuple(item.get("value", "") for item in found.iter(control.item))
        if not all(labels) or len(set(labels)) != len(labels):
            raise ConfigError(where, f"every <{control.item}> needs a value of its own")
        for point in root.iter("KeyPointLabels"):  # the smart tool of one click
            strange = {item.get("value", "") for item in point.iter("Label")} - set(labels)
            if strange:
                raise ConfigError(where, f"<KeyPointLabels> offers {', '.join(sorted(strange))}, <{control.tag}> does not")
        return cls(from_name=from_name, to_name=to_name, data_key=value.removeprefix("$"), labels=labels)
