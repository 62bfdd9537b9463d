"""The config: its keys (`schema`) and how it is read (`load`)."""

from doccls.config.load import Override, load_config, parse_override, render_snapshot
from doccls.config.schema import Config

__all__ = ["Config", "Override", "load_config", "parse_override", "render_snapshot"]
