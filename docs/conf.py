"""Sphinx settings of the report. build.py gathers the pages; everything works without a network."""

import html
import os
import re
import textwrap
from pathlib import Path, PurePosixPath

import pypandoc
import ziamath
from docutils import nodes

from mmflow_utils.params import Params

project = "Cross-modal information flow"
author = "The mmflow maintainers"
copyright = "The mmflow maintainers; MIT license"
extensions = ["nbsphinx"]
nbsphinx_execute = "never"
# nbsphinx looks for pandoc on the path; ours came with pip.
os.environ["PATH"] = f"{Path(pypandoc.get_pandoc_path()).parent}{os.pathsep}{os.environ['PATH']}"
nbsphinx_requirejs_path = ""  # no page has a script of its own, and the default address is another host
html_math_renderer = "drawn"
html_use_index = False
suppress_warnings = ["misc.highlighting_failure"]  # a block in a language that nobody colors is plain text
ziamath.config.svg2 = False  # whole paths: glyph definitions of two formulas can't clash on a page

html_theme = "pydata_sphinx_theme"
html_title = "Cross-modal information flow"
html_static_path = ["_static"]
html_css_files = ["report.css"]
html_show_sourcelink = False
html_copy_source = False
# Summaries would be fetched, and a page that was opened from a file may fetch nothing.
html_show_search_summary = False
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is; unset, the theme complains
html_theme_options = {
    "logo": {"text": "mmflow"},
    "navigation_with_keys": True,
    "show_toc_level": 2,
    "header_links_before_dropdown": 4,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}


def draw(latex: str, **how) -> str:
    """Draw a formula as SVG while the site is built: no script, no font, no other host is needed."""
    # ziamath shows the backslash of an escaped underscore in text.
    drawn = re.sub(r"\\text\{[^}]*\}", lambda text: text[0].replace(r"\_", "_"), latex)
    formula = ziamath.Latex(drawn, size=17, color="currentColor", **how)
    says = html.escape(" ".join(latex.split()), quote=True)
    below = f"vertical-align: {formula.getyofst():.1f}px"
    return formula.svg().replace("<svg ", f'<svg role="img" aria-label="{says}" style="{below}" ', 1)


def draw_inline(translator, node):
    """Write a formula of the running text."""
    translator.body.append(draw(node.astext(), inline=True))
    raise nodes.SkipNode


def draw_display(translator, node):
    """Write a displayed formula, in a box that scrolls on a narrow screen."""
    translator.body.append(f'<div class="math-display">{draw(node.astext())}</div>\n')
    raise nodes.SkipNode


def describe_pictures(app, doctree):
    """Give each picture an alt text: the sentence before it, or its section's title."""
    said = ""
    for node in doctree.findall(lambda node: isinstance(node, nodes.paragraph | nodes.title | nodes.image)):
        if not isinstance(node, nodes.image):
            said = node.astext().removeprefix("Figure: ") or said
        elif not node.get("alt"):
            node["alt"] = textwrap.shorten(f"Figure: {said}", 200, placeholder=" …")


def describe_thumbnails(app, pagename, templatename, context, doctree):
    """Give the gallery's thumbnails an alt text: nbsphinx leaves it empty."""
    context["body"] = re.sub(
        r'<img alt="" (src="[^"]*"></div>\s*<div>(.*?)</div>)',
        r'<img alt="Figure of \2" \1',
        context.get("body", ""),
    )


def lead_to_pages(app, doctree):
    """Let links of docs/ lead to pages of this site; what has no page here keeps its name only."""
    if not app.env.docname.startswith("docs/"):
        return
    first = f"{Params().model}/"  # of a notebook's pages, that of the model which it studies by default
    pages = sorted(app.env.found_docs, key=lambda page: (not page.startswith(first), page))
    for node in list(doctree.findall(nodes.reference)):
        target, _, part = node.get("refuri", "").partition("#")
        name = node.astext()
        if name.startswith("``"):  # reStructuredText has no code in the name of a link, and pandoc tries
            node.children = [nodes.literal(text=name.strip("`"))]
        if not target or ":" in target:
            continue
        stem = PurePosixPath(target).stem if target.endswith((".md", ".ipynb")) else None
        if page := next((page for page in pages if PurePosixPath(page).name == stem), None):
            node["refuri"] = app.builder.get_relative_uri(app.env.docname, page) + (part and f"#{part}")
        else:
            node.replace_self(node.children)


def setup(app):
    """Register what Sphinx and nbsphinx don't bring."""
    app.add_html_math_renderer("drawn", (draw_inline, None), (draw_display, None))
    app.connect("doctree-read", describe_pictures)
    app.connect("doctree-read", lead_to_pages)
    app.connect("html-page-context", describe_thumbnails)
