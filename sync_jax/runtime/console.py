"""Text from files and folders, which could hold anything, as text that can be shown."""


def printable(text: object) -> str:
    r"""The text with all that is no visible character escaped, as \x1b.

    So nothing that a file is called or says can move a terminal's cursor, break a line, turn the
    direction of writing or fail to be encoded.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def say(line: object) -> None:
    """Prints a line of such text."""
    print(printable(line), flush=True)
