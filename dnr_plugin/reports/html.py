"""Self-contained HTML: tables, and plots embedded with their captions."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ccc;padding:.2rem .7rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    "figure{margin:1.5rem 0}figcaption{color:#555;font-size:.9rem}"
)


def html_page(title: str, *parts: str) -> str:
    """A whole page from a title and parts that are HTML already."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def html_items(texts: Iterable[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"


def html_images(files: Sequence[Path], captions: Mapping[str, str]) -> str:
    """PNG files, embedded, each above the caption of its stem."""
    return "".join(
        f'<figure><img alt="{file.stem}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(captions[file.stem])}</figcaption></figure>"
        for file in files
    )
