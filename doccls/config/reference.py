"""docs/config.md, from the schema: every key, its default, what it takes and what it means."""

from doccls.config.load import MODES, describe_allowed, read_mode
from doccls.config.schema import SECTIONS

_HEAD = """\
# Every config key

Written by `doccls check --keys`. `--set key=value` wins over the YAML file, the file over the mode (`--mode`, or the
key `mode`), the mode over the default. The modes' own values: `doccls/config/modes/`. Paths are relative to the config
file.
"""


def render_keys() -> str:
    """Markdown: a table a section; under a default, what the modes put in its place."""
    lines = [_HEAD]
    modes = {mode: {".".join(key): stated.value for key, stated in read_mode(mode)} for mode in MODES}
    for name, section in SECTIONS.items():
        lines += [f"## {name}", "", "| key | default | takes | |", "| --- | --- | --- | --- |"]
        for key, field in section.model_fields.items():
            default = "needed" if field.is_required() else f"`{_render_default(field.default)}`"
            for mode, values in modes.items():
                if f"{name}.{key}" in values:
                    default += f"<br>{mode}: `{_render_default(values[f'{name}.{key}'])}`"
            takes = describe_allowed(field).replace("|", "\\|")
            lines.append(f"| `{name}.{key}` | {default} | {takes} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def _render_default(value: object) -> str:
    named = {None: "null", True: "true", False: "false"}
    return named[value] if value is None or isinstance(value, bool) else str(value)
