"""The text of the deck, book/_slides/one_day.md, cut into slides. Its first lines say how it is written."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DECK = ROOT / "book" / "_slides" / "one_day.md"
FIELDS = ("minutes", "figure", "table", "printed")
SLOT = re.compile(r"(\d\d):(\d\d)–(\d\d):(\d\d) +(.+)")


@dataclass(frozen=True)
class Slide:
    """One slide: `asked` is shown at once, `told` with the next key; `slot` is set if it opens one."""

    title: str
    fields: dict[str, str]
    asked: str
    told: str
    notes: str
    slot: tuple[int, int] | None

    @property
    def minutes(self) -> int:
        """How long the slide is meant to stand."""
        return int(self.fields["minutes"])


def read_slides(text: str) -> list[Slide]:
    """The slides of a deck's text. Raises ValueError with the slide's title where something is wrong."""
    found = re.split(r"^(#{1,2}) +(.+)$", text, flags=re.M)[1:]
    return [_slide(*found[i : i + 3]) for i in range(0, len(found), 3)]


def _slide(marks: str, title: str, rest: str) -> Slide:
    slot = None
    if marks == "#":
        opened = SLOT.fullmatch(title.strip())
        if not opened:
            raise ValueError(f"{title!r}: a slot's heading reads `# 09:00–09:20 Title`")
        start, start_minute, end, end_minute = map(int, opened.groups()[:4])
        slot, title = (60 * start + start_minute, 60 * end + end_minute), opened[5]
    fields, lines = {}, rest.strip().splitlines()
    while lines and (field := re.fullmatch(r"([a-z]+): *(.+)", lines[0])):
        if field[1] not in FIELDS or field[1] in fields:
            raise ValueError(f"{title!r}: the field {field[1]!r} is unknown or stands twice; known: {FIELDS}")
        fields[field[1]] = field[2].strip()
        lines.pop(0)
    if not re.fullmatch(r"[1-9]\d*", fields.get("minutes", "")):
        raise ValueError(f"{title!r}: needs a line `minutes: 3`, got {fields.get('minutes')!r}")
    body, notes = _cut("\n".join(lines), "Notes:", title)
    asked, told = _cut(body, "Answer:", title)
    if not notes:
        raise ValueError(f"{title!r}: has no `Notes:`")
    return Slide(title.strip(), fields, asked, told, notes, slot)


def _cut(text: str, mark: str, title: str) -> tuple[str, str]:
    """What stands before a line that begins with `mark`, and after the mark."""
    parts = re.split(rf"^{mark} *", text, flags=re.M)
    if len(parts) > 2:
        raise ValueError(f"{title!r}: has {mark!r} twice")
    return parts[0].strip(), parts[1].strip() if len(parts) == 2 else ""


def is_predicted(slide: Slide) -> bool:
    """Whether the slide asks first; then its figure, table and printed line wait for the next key."""
    return slide.asked.startswith("Predict:")


def slots(slides: list[Slide]) -> list[tuple[str, int, int, int]]:
    """(title, start, end, minutes of its slides) of each slot, times in minutes of the day."""
    found = []
    for slide in slides:
        if slide.slot:
            found.append([slide.title, *slide.slot, 0])
        found[-1][3] += slide.minutes
    return [tuple(one) for one in found]


def clock(minutes: int) -> str:
    """Minutes of the day as `09:05`."""
    return f"{minutes // 60:02}:{minutes % 60:02}"


if __name__ == "__main__":
    for title, start, end, minutes in slots(read_slides(DECK.read_text(encoding="utf-8"))):
        print(f"{clock(start)}–{clock(end)}  {minutes:3} minutes on slides  {title}")
