"""Lines for the console, from text that could hold anything."""


def printable(text: object) -> str:
    r"""The text with all that is no visible character escaped, as \x1b.

    So nothing that a file is called or says can move a terminal's cursor, break a line, turn the
    direction of writing or fail to be encoded.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def one_line(error: BaseException) -> str:
    """The first 300 characters of an error's message, or the name of its type, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def say(line: object) -> None:
    """Prints a line with `printable` text."""
    print(printable(line), flush=True)
