"""The reports that commands leave: what a page shows (`page`), and the page as HTML and as Markdown.

May import: _extras, output.
Start reading with `page`, then `run`, which makes the page of a run from its output directory.
"""
