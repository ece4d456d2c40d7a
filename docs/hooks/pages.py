"""A hook of MkDocs: pages from outside ``docs/`` become pages of the site, and links between them lead there.

The files keep links that work in the repository, such as ``../benchmarks/int8.md`` in ``docs/int8.md``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "benchmarks/*.md", "docker/*", "deploy/Dockerfile", "deploy/**/*.*")
"""Files, or patterns of them, that the site has besides ``docs/``."""

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>(~?)([\w.]+)</code>")
"""A reference of Sphinx in a docstring, as Markdown has rendered it."""

LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for pattern in OUTSIDE:
        for file in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, site_path(file.relative_to(ROOT)), abs_src_path=str(file)))
    return files


def site_path(path: str | Path) -> str:
    """Where the site has a file of the repository."""
    return str(path).removeprefix("docs/")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links between files of the repository by links between pages of the site."""
    source = Path(page.file.abs_src_path)
    here = os.path.dirname(page.file.src_uri)

    def on_the_site(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        if not target.is_relative_to(ROOT):
            return link[0]
        return link[1] + os.path.relpath(site_path(target.relative_to(ROOT)), here or ".")

    return LINK.sub(on_the_site, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace references of Sphinx by names, with a link where the page describes the name."""

    def name(role: re.Match[str]) -> str:
        text = role[2].rpartition(".")[2] if role[1] or role[2].startswith("darktrt.") else role[2]
        anchor = f"darktrt.{text}"
        return f'<a href="#{anchor}"><code>{text}</code></a>' if f'id="{anchor}"' in content else f"<code>{text}</code>"

    return ROLE.sub(name, content)
