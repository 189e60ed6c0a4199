"""Words in a config's argument, as in --config=configs/gpt3l.py:rotary,8k."""

from collections.abc import Collection


def parse_variants(recipe: str, arg: str | None, supported: Collection[str]) -> set[str]:
    """The words of a config's argument.

    Raises:
        ValueError: a word is not supported; the message names those that are.
    """
    variants = {word for word in (arg or "").split(",") if word}
    unknown = sorted(variants - set(supported))
    if unknown:
        raise ValueError(
            f"{recipe} has no variant {unknown[0]!r}; supported: {', '.join(sorted(supported))}"
        )
    return variants
