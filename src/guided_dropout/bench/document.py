"""A document as a list of blocks, and its two renderings: Markdown beside figure files, and one HTML page.

Texts are plain but for `code` between backticks; everything else is escaped, in both renderings.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from guided_dropout.artefacts import write_text

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
FIGURES_NAME = "figures"


@dataclass(frozen=True)
class Heading:
    """A section's heading; the document's title is level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text; `strong` sets it off, for a result that must not be missed."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first column is text; the others are numbers unless `text_columns` names them (from 0)."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = (0,)


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
        name: file name in the Markdown rendering, without suffix.
        svg: one ``<svg>`` element, trusted.
        alt: what can be seen, for those who cannot.
        caption: what it means.
    """

    name: str
    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to be copied as they are."""

    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until they are asked for, under a line that says what they hold."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Bullets | Table | Picture | Code | Details


def write_document(folder: str | Path, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    """Write both renderings and the drawings: ``report.html``, ``report.md``, ``figures/*.svg``.

    Returns:
        Paths of ``report.html`` and ``report.md``.

    Raises:
        ArtefactError: the folder cannot be written.
    """
    folder = Path(folder)
    html_file, markdown_file = folder / HTML_NAME, folder / MARKDOWN_NAME
    for picture in pictures(blocks):
        write_text(folder / FIGURES_NAME / f"{picture.name}.svg", picture.svg)
    write_text(html_file, to_html(title, blocks))
    write_text(markdown_file, to_markdown(blocks))
    return html_file, markdown_file


def pictures(blocks: Sequence[Block]) -> list[Picture]:
    """All drawings, in their order."""
    found = []
    for block in blocks:
        found += [block] if isinstance(block, Picture) else pictures(block.blocks) if isinstance(block, Details) else []
    return found


def to_markdown(blocks: Sequence[Block], figures: str = FIGURES_NAME) -> str:
    """GitHub-flavoured Markdown; pictures are referred to as ``{figures}/{name}.svg``."""
    return "\n\n".join(_markdown(block, figures) for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that refers to nothing outside itself, for wide and narrow, light and dark screens."""
    style = resources.files("guided_dropout.bench").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_md(block.text)}"
        case Paragraph():
            return f"**{_md(block.text)}**" if block.strong else _md(block.text)
        case Bullets():
            return "\n".join(f"- {_md(item)}" for item in block.items)
        case Table():
            rule = ["---" if i in block.text_columns else "---:" for i in range(len(block.header))]
            cells = [[_md(c).replace("|", r"\|") for c in row] for row in (block.header, *block.rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
        case Picture():
            return f"![{_md(block.alt)}]({figures}/{block.name}.svg)\n\n{_md(block.caption)}"
        case Code():
            return f"```\n{block.text}\n```"
        case Details():
            inside = "\n\n".join(_markdown(b, figures) for b in block.blocks)
            return f"<details>\n<summary>{html.escape(block.summary)}</summary>\n\n{inside}\n\n</details>"


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
        case Paragraph():
            return f'<p class="strong">{_inline(block.text)}</p>' if block.strong else f"<p>{_inline(block.text)}</p>"
        case Bullets():
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in block.items) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Picture():
            picture = f'<div class="picture" role="img" aria-label="{html.escape(block.alt)}">{block.svg}</div>'
            return f"<figure>\n{picture}\n<figcaption>{_inline(block.caption)}</figcaption>\n</figure>"
        case Code():
            return f"<pre><code>{html.escape(block.text)}</code></pre>"
        case Details():
            inside = "\n".join(_html(b) for b in block.blocks)
            return f"<details>\n<summary>{_inline(block.summary)}</summary>\n{inside}\n</details>"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if i in table.text_columns else ' class="number"' for i in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{k}>{_inline(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True))}</tr>"

    body = "\n".join(row(r, "td") for r in table.rows)
    return (
        f'<div class="table" tabindex="0">\n<table>\n<thead>\n{row(table.header, "th")}\n</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _md(text: str) -> str:
    """Escape what Markdown would take for markup, outside of code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") and len(p) > 1 else re.sub(r"([\\*_~$&<\[\]])", r"\\\1", p) for p in parts)
