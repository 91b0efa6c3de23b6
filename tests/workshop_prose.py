"""The prose of a chapter as plain Markdown: Jupyter shows no MyST, and a learner sees no solution."""

import re

ROLE = re.compile(r"\{(?!cite)[\w:-]+\}`([^`<]+?)(?: *<[^>`]*>)?`")
CITED = re.compile(r" ?\{cite:[\w]+\}`[^`]*`")
GATE = r"(?m)^[:`]{3,}\{%s\} *(\S*)\n(?::[\w-]+:.*\n)*[:`]{3,}\n?"
EXERCISE_START, EXERCISE_END, SOLUTION_START, SOLUTION_END = (
    re.compile(GATE % f"{kind}-{end}") for kind in ("exercise", "solution") for end in ("start", "end")
)


def plain_markdown(markdown: str) -> str:
    """Directives as bold titles, roles as their words, no solution's words."""
    text = SOLUTION_START.split(SOLUTION_END.split(f"{markdown}\n")[-1])[0]
    text = EXERCISE_END.sub("", text)
    text = EXERCISE_START.sub(lambda m: f"**Exercise** `{m[0].split(':label:')[1].split()[0]}`\n\n", text)
    text = re.sub(r"(?m)^[`:]{3,}\{(?!code|math|raw)([\w-]+)\} *(.*)\n(?::[\w-]+:.*\n)*", _title, text)
    text = re.sub(r"(?m)^:{3,} *\n?", "", text)
    text = re.sub(r"(?m)^\([\w-]+\)=\n", "", text)
    return CITED.sub("", ROLE.sub(r"\1", text)).strip()


def _title(found: re.Match) -> str:
    """The argument of a directive, or its name, as a bold line."""
    return f"**{(found[2] or found[1]).strip()}**\n\n"
