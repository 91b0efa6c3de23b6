"""book/workshop.md: three tracks, whose timetables come from the chapters; `make workshop-page` writes it.

test_workshop_page.py holds the page to what would be written, and each track to its hours.
"""

from workshop_tracks import (
    ANSWER,
    EXERCISE,
    PICTURE,
    ROOT,
    SESSION,
    Claims,
    Exercise,
    Own,
    Picture,
    Talk,
    Work,
    chapter,
    clock,
    measured,
    numbers,
    term,
    timetable,
    total,
)

PAGE = "book/workshop.md"
NINETY = [
    Talk(5, "Setup check on every machine; pairs where one fails"),
    Work("00", ("A task", "The base model fails")),
    Work("00", ("The adapter", "A minute of training", "The model has learned"), runs=False),
    Picture("01", "Two rows of five pictures, cut to ranks", "a picture and noise, cut to low rank"),
    Work("00", ("What it costs in bytes",), runs=False),
    Picture("06", "Three heat maps of the same", "four bits with one scale, and with one for each block"),
    Exercise("00", "quickstart-forgetting", "is it still a language model?"),
    Own(8, "Your own adapter: another rank in [00](00_quickstart.ipynb); guess, and run again"),
    Talk(6, "Discussion, and where to read on"),
]
DAY = [
    Talk(10, "Setup check on every machine; pairs where one fails"),
    Work(
        "00",
        ("A task", "The base model fails", "The adapter", "A minute of training", "The model has learned"),
    ),
    Work("00", ("What it costs in bytes",), runs=False),
    Exercise("00", "quickstart-rank", "how many parameters"),
    Talk(10, "Break"),
    Work("03", ("The layer", "The start", "What α does")),
    Work("04", ("Where adapters can go", "A name that fits nothing", "Which layers")),
    Exercise("04", "adapters-65b", "count before you train"),
    Talk(45, "Lunch"),
    Picture("06", "Three heat maps of the same", "four bits with one scale, and with one for each block"),
    Work("07", ("The edges of equal slices", "Trained weights")),
    Talk(10, "Break"),
    Work("10", ("The layer", "One layer, drawn")),
    Work("11", ("What is there between two steps", "Does LoRA save activations?", "How much less?")),
    Exercise("11", "memory-ex-rank", "what a higher rank costs"),
    Talk(10, "Break"),
    Work("13", ("Settings", "Will it fit?", "Your rows", "Train", "Save, and load again")),
    Talk(12, "Discussion: each pair says which claim it had guessed wrong"),
]
SECOND_DAY = [
    Talk(5, "What was open yesterday"),
    *(Claims(number) for number in ("01", "02", "05", "06")),
    Talk(10, "Each pair tells the claim that surprised it most"),
    Talk(10, "Break"),
    *(Claims(number) for number in ("08", "09", "12", "14")),
    Talk(10, "Each pair tells the claim that surprised it most"),
    Talk(45, "Lunch"),
    *(Claims(number) for number in ("15", "16", "17")),
    Talk(10, "Break"),
    *(Claims(number) for number in ("18", "19")),
    Talk(30, "One question of part V for each pair, answered in two minutes by a run"),
]
MOST = {"NINETY": 90, "DAY": 7 * 60, "SECOND_DAY": 7 * 60}


def page() -> str:
    """The page's text."""
    template = (ROOT / "tests" / "workshop_template.txt").read_text(encoding="utf-8")
    found = measured()
    missing = [number for number in numbers() if chapter(number).path.stem not in found]
    unmeasured = f" Not measured, and set to the longest wait: {', '.join(missing)}." if missing else ""
    return template.format(
        answer=ANSWER,
        easy=EXERCISE["Easy"],
        medium=EXERCISE["Medium"],
        hard=EXERCISE["Hard"],
        picture=PICTURE,
        session=SESSION,
        unmeasured=unmeasured,
        longest=max(found.values()),
        ninety=timetable(NINETY),
        ninety_total=total(NINETY),
        day=timetable(DAY),
        day_total=clock(total(DAY)),
        second=timetable(SECOND_DAY),
        second_total=clock(total(SECOND_DAY)),
        term=term(),
    )


if __name__ == "__main__":
    (ROOT / PAGE).write_text(page(), encoding="utf-8")
