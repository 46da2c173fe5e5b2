"""Prompt templates. Without PyTorch, so that a command line can be checked before it is loaded."""

from __future__ import annotations


def split_template(template: str) -> tuple[str, str]:
    """Context and suffix of a template: ``("a photo of a", ".")`` of ``"a photo of a {}."``.

    The prompt of ``name`` is then ``f"{context} {name}{suffix}"``; the learned context starts from
    the words in front, of which there must be at least one.

    Raises:
        ValueError: not one ``{}``, or nothing or no space in front of it.
    """
    context, brackets, suffix = template.partition("{}")
    if not brackets or any(sign in context + suffix for sign in "{}"):
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
