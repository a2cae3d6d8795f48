"""Pages of the site that lie outside docs/, and the links between all of them.

README.md is the first page. A link to another file of the repository leads to a copy of it.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "docker/README.md": "docker.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def place(file):
    """Where a file of the repository lies in the site."""
    return PAGES.get(file, file.removeprefix("docs/"))


def target(link, source):
    """The file of the repository that a link in `source` means."""
    return normpath(str(PurePosixPath(source).parent / link))


def linked(text, source):
    """The text of the page `source` with links that hold in the site, where every page lies at the top."""
    return LINK.sub(lambda found: place(target(found[1], source)), text)


def on_files(files, config):
    """Adds the pages outside docs/, and the files that any page links to."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    texts |= {f"docs/{page.name}": page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=linked(texts[name], name)))
    wanted = {target(link, name) for name, text in texts.items() for link in LINK.findall(text)}
    for name in sorted(wanted - texts.keys()):
        if (ROOT / name).is_file() and not name.startswith("docs/"):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Mends the links of a page of docs/."""
    return markdown if page.file.src_uri in PAGES.values() else linked(markdown, f"docs/{page.file.src_uri}")
