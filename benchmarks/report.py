"""Writes the results of a benchmark as Markdown."""

from collections.abc import Sequence

from studies.tables import markdown_table

Part = str | tuple[Sequence[str], Sequence[Sequence[str]]]  # a paragraph, or the header and rows of a table


def document(*parts: Part) -> str:
    """Markdown with a blank line between the parts; empty paragraphs are left out."""
    texts = [part if isinstance(part, str) else "\n".join(markdown_table(*part)) for part in parts]
    return "\n\n".join(filter(None, texts)) + "\n"
