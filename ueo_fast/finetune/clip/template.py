"""Prompt templates: the words before and after the class name."""

from __future__ import annotations


def split_template(template: str) -> tuple[str, str]:
    """Context and suffix of a template such as ``"a photo of a {}."``.

    Args:
        template: with one ``{}`` where the class name goes; the words before it, at least one, are
            where the learnt context starts.

    Returns:
        ``("a photo of a", ".")``: the prompt of ``name`` is ``f"{context} {name}{suffix}"``.

    Raises:
        ValueError: not one ``{}``, or nothing or no space before it.
    """
    context, brackets, suffix = template.partition("{}")
    if not brackets or "{" in suffix or "}" in suffix or "{" in context or "}" in context:
        raise ValueError(
            f"prompt_template={template!r} must have {{}} once, where the class name goes, e.g. "
            "'a photo of a {}.'"
        )
    if not context.strip() or not context[-1].isspace():
        raise ValueError(
            f"prompt_template={template!r} must have at least one word and a space before {{}}: "
            "these words are where the learnt context starts"
        )
    return context.strip(), suffix
