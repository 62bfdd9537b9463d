"""`doccls store info | clear`: show or clear the store of decoded pages."""

import argparse
from pathlib import Path

from doccls.config.arguments import add_config_arguments, load_arguments
from doccls.config.paths import find_problem, is_absent, resolve_option
from doccls.data.store import PageSet, choose_store, clear_page_set, list_page_sets
from doccls.errors import UserError
from doccls.system.disk import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls store`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="show its page sizes, pages, bytes, and the versions that made them")
    clear = actions.add_parser("clear", help="remove its pages; a run that needs them decodes them again")
    clear.add_argument(
        "--unused", action="store_true", help="only pages made by other versions, which the installed ones cannot use"
    )
    for action in (info, clear):
        action.add_argument(
            "folder", nargs="?", type=Path, metavar="FOLDER", help="the store (or --config of a run that uses it)"
        )
        add_config_arguments(action, required=False)


def store(arguments: argparse.Namespace) -> int:
    """Show or clear the store that the arguments name, and return the exit code.

    Raises:
        UserError: no store is named, or its pages are being decoded.
    """
    folder = _find_folder(arguments)
    problem = None if is_absent(folder) else find_problem(folder, "folder")
    if problem is not None:
        raise UserError(f"{'data.store' if arguments.folder is None else 'FOLDER'}: {problem}")
    sets = list_page_sets(folder)
    if arguments.action == "info":
        print("\n".join(_describe(folder, sets)))
        return 0
    chosen = [pages for pages in sets if not (arguments.unused and pages.usable)]
    for pages in chosen:
        clear_page_set(pages)
        print(f"removed {pages.folder}: {_count(pages.pages)}, {format_size(pages.size_bytes)}", flush=True)
    if not chosen:
        print(f"{folder}: nothing to remove")
    return 0


def _find_folder(arguments: argparse.Namespace) -> Path:
    if (arguments.folder is None) == (arguments.config is None):
        raise UserError("give either the store's FOLDER or --config FILE of a run that uses it")
    if arguments.folder is not None:
        return resolve_option(arguments.folder, "FOLDER")
    config = load_arguments(arguments)
    choice = choose_store(config)
    if choice is None:
        raise UserError(f"{arguments.config}: data.store is off, so there is no store")
    return choice.folder


def _describe(folder: Path, sets: list[PageSet]) -> list[str]:
    if not sets:
        return [f"{folder}: no decoded pages"]
    total, size_bytes = sum(pages.pages for pages in sets), sum(pages.size_bytes for pages in sets)
    lines = [f"{folder}: {_count(total)}, {format_size(size_bytes)}"]
    for pages in sets:
        line = f"  {pages.size_px} px: {_count(pages.pages)}, {format_size(pages.size_bytes)}, made by {pages.made_by}"
        if not pages.usable:
            line += "; not used by the installed versions (doccls store clear --unused)"
        if pages.damaged:
            line += f"; {pages.damaged} damaged files are skipped"
        lines.append(line)
    return lines


def _count(pages: int) -> str:
    return f"{pages:,} pages" if pages != 1 else "1 page"
