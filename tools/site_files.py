"""Gives the site the repository's own layout, so that links between its files hold in both (a hook of mkdocs).

The pages of docs/ stay in docs/, and what they link to outside comes along: Markdown as a page, source as a page that
shows it, everything else as it is.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"""\]\(<?([^)#\s>]+)|\b(?:src|srcset|href)=["']([^"'#]+)""")
SHOWN = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".json": "json", ".toml": "toml"}


class SourcePage(File):
    """A file of source text that is shown as a page of its own."""

    def is_documentation_page(self) -> bool:
        """Return True, although the name does not end in .md."""
        return True


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Return the theme's files, those of docs/ under their paths in the repository, and what these link to."""
    ours = [Path(file.abs_src_path) for file in files if file.src_dir == config.docs_dir and file.abs_src_path]
    paths = dict.fromkeys([*ours, *(ROOT / path for path in _leaves(config.nav))])
    waiting = list(paths)
    while waiting:
        new = [path for path in _linked(waiting.pop()) if path not in paths]
        paths.update(dict.fromkeys(new))
        waiting += new
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *(_file(path, config) for path in paths if path.is_file())])


def _leaves(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav or ()
    return [path for value in inner for path in _leaves(value)]


def _linked(page: Path) -> list[Path]:
    """Return the files of the repository that a Markdown page names."""
    if page.suffix != ".md" or not page.is_file():
        return []
    names = [one or other for one, other in LINK.findall(page.read_text(encoding="utf-8"))]
    paths = [Path(os.path.normpath(page.parent / name)) for name in names if "://" not in name]
    return [path for path in paths if path.is_file() and path.is_relative_to(ROOT)]


def _file(path: Path, config: MkDocsConfig) -> File:
    name = path.relative_to(ROOT).as_posix()
    # mkdocs then warns of a page of docs/ that the navigation leaves out, and of no other
    must_be_in_nav = path.is_relative_to(config.docs_dir)
    inclusion = InclusionLevel.UNDEFINED if must_be_in_nav else InclusionLevel.NOT_IN_NAV
    if path.suffix not in SHOWN:
        return File.generated(config, name, abs_src_path=str(path), inclusion=inclusion)
    text = f"# {path.name}\n\n`{name}`\n\n`````{SHOWN[path.suffix]}\n{path.read_text(encoding='utf-8')}\n`````\n"
    return SourcePage.generated(config, name, content=text, inclusion=inclusion)
