# SPDX-License-Identifier: Apache-2.0
"""Readies a checkout for a package index, which shows the README on a page of its own, far from the repository.

    python docs/absolute_links.py https://github.com/OWNER/NAME v0.1.0

Where the repository is at home only those know who publish it, so the release workflow runs this, and nothing of it is
committed: links and pictures of the README lead to that tag's files, and pyproject.toml gets its ``project.urls``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from readme_sections import LINK


def absolute(markdown: str, home: str, tag: str) -> str:
    """Markdown whose links lead to the files of a tag of a repository on GitHub at ``home``."""

    def led(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups(default="")
        return f"{mark}[{text}]({home}/{'raw' if mark else 'blob'}/{tag}/{target}{anchor})" if target else match[0]

    return LINK.sub(led, markdown)


def urls(home: str, tag: str) -> str:
    """The table of a pyproject.toml that names the repository and what is in it."""
    places = {
        "Homepage": home,
        "Documentation": f"{home}/blob/{tag}/README.md",
        "Changelog": f"{home}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{home}/issues",
    }
    return "\n[project.urls]\n" + "".join(f'{name} = "{place}"\n' for name, place in places.items())


def ready(root: Path, home: str, tag: str) -> None:
    """Rewrite README.md and pyproject.toml under ``root``. Raises ValueError if that was done before."""
    readme, project = root / "README.md", root / "pyproject.toml"
    if "[project.urls]" in project.read_text():
        raise ValueError(f"{project} has its URLs: start from a fresh checkout")
    readme.write_text(absolute(readme.read_text(), home, tag))
    project.write_text(project.read_text() + urls(home, tag))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", help="where the repository is, without a slash at the end")
    parser.add_argument("tag")
    args = parser.parse_args()
    ready(Path(__file__).parents[1], args.home, args.tag)
