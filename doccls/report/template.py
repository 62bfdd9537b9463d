"""The HTML files of doccls: templates that are filled with escaped values, their styles, scripts and data."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

from doccls.report.thumbnails import MEDIA_TYPE, Thumbnails


def render_template(
    name: str, styles: Sequence[str], scripts: Sequence[str], data: Mapping[str, object], **values: object
) -> str:
    """Render a template of this package with files of it as style and script; equal values give equal text.

    `data` is what the scripts read: JSON in which nothing can end the script element.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = lambda value: f"{value:.3f}"
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return environment.get_template(name).render(
        data=Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")),
        style=Markup("".join(map(_read_file, styles))),
        script=Markup('"use strict";\n' + "".join(map(_read_file, scripts))),
        **values,
    )


def describe_thumbnails(thumbnails: Thumbnails | None) -> dict[str, object]:
    """Return what the scripts read of the thumbnails; None if none are to be shown."""
    return {"media_type": MEDIA_TYPE, "thumbnails": {} if thumbnails is None else thumbnails.content}


def _read_file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
