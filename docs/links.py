"""Let the pages read well both on a git host and on the site: a hook of mkdocs.

Pages are written for the git host: links are relative paths in the repository. This hook takes the pages outside of docs/ into
the site (`PAGES`), and turns every link to a file of the repository into a link to its page. Source files have no page: of a
link to one the text remains. A link to a file that does not exist stays as it is, for the strict build to refuse.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {  # path in the repository -> path on the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/README.md": "benchmarks.md",
    "soul/integrations/open_unlearning/README.md": "open-unlearning.md",
}
PICTURES = "bench/results/**/*.png"
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Add the pages and pictures that lie outside of docs/."""
    pictures = {str(path.relative_to(ROOT)): str(path.relative_to(ROOT)) for path in ROOT.glob(PICTURES)}
    for source, target in (PAGES | pictures).items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links of a page, outside of its blocks of code, into those of the site."""
    on_site = page.file.src_uri
    source = {target: source for source, target in PAGES.items()}.get(on_site, f"docs/{on_site}")

    def convert(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        uri = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(uri):
            uri = posixpath.relpath(uri, posixpath.dirname(on_site) or ".")
            return f"{match['text']}({uri}{match['anchor'] or ''})"
        return match["text"].strip("[]") if (ROOT / target).exists() else match[0]

    pieces = CODE_BLOCK.split(markdown)
    return "".join(piece if piece.startswith("```") else LINK.sub(convert, piece) for piece in pieces)
