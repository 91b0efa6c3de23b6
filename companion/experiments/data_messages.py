"""build_data.py, SpamAssassin: message body -> spam or ham.

Dropped, because it tells the label without telling the reason: headers, HTML, quoted lines and what
introduces them, signatures, the footers of mailing lists, news feeds sent as mail. Masked: addresses, links,
telephone numbers. Messages with letters beyond ASCII are dropped: few of them are English. Of messages whose
three-word shingles overlap by 0.3 (Jaccard) or more, one is kept.
"""

import email
import html
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

from data_splits import UNWANTED, Row, normalised, shuffled

QUOTES = str.maketrans("‘’“”–—´`…•·", "''\"\"--''.**")
FOOTER = re.compile(
    r"\n *-- ?\n|\n[_=-]{20,}\n.*(mailing list|sponsored)|-+ *Yahoo! Groups Sponsor"
    r"|\nTo unsubscribe from this group|\nThis sf.net email|-+ ?Original Message ?-+"
    r"|-----BEGIN PGP SIGNATURE",
    re.IGNORECASE,
)
LEAKS = [  # lines of an answer or of a forwarding programme
    r"-----BEGIN PGP SIGNED MESSAGE-----\nHash: \w+\n",
    r"(?im)^-* ?begin forwarded (text|message).*$",
    r"(?m)^(On .*\n)?.*\b(wrote|writes|mentioned) ?:\s*(>.*)?$|^Quoting .*:\s*$",
    r"(?m)^.*\bsaid ?:\s*\n(?=\s*[>|])",
    r"(?m)^\s*(\w{0,4}[>|]|--\]).*$",
    r"(?mi)^ *(from|to|cc|sent|date|subject|message-id|content-[\w-]+|forwarded-by|url): .*$",
]
MASKS = [
    (r"[\w.+=-]+@[\w-]+(\.[\w-]+)+", "[email]"),
    (r"(?i)(\b[a-z]+://|\bmailto:|\bwww\.)[^\s<>\")\]]+", "[link]"),
    (r"(\+?\d[ .-])?\(?\b\d{3}\)?[ ./-]{1,2}\d{3}[ .-]\d{4}\b|\+ ?\d[\d ().-]{7,}\d", "[phone]"),
    (r"(?i)\b(tel|phone|fax|mobile|cell)\b[.: ]*[+(\d][\d ().+/-]{5,}\d", "[phone]"),
    (r"([-=_*~#+.|<>])(\s?[-=_*~#+.|<>]){3,}|\S{41,}", "..."),
]


def message_text(raw: bytes) -> str:
    """The first part of a message that has text: plain text first, HTML else."""
    parts = [p for p in email.message_from_bytes(raw).walk() if p.get_content_maintype() == "text"]
    for part in sorted(parts, key=lambda part: part.get_content_subtype() != "plain"):
        payload = part.get_payload(decode=True) or b""
        try:
            text = payload.decode(part.get_content_charset() or "utf-8")
        except (LookupError, UnicodeDecodeError):
            text = payload.decode("cp1252", errors="replace")
        if text.strip():
            return text.replace("\r", "")
    return ""


def clean_message(text: str, limit: int = 500) -> str:
    """One line of plain text, at most `limit` characters, cut between words."""
    text = re.sub(r"(?is)<!--.*?-->|<(script|style|title)\b.*?</\1\s*>", " ", text)
    text = html.unescape(re.sub(r"(?s)</?[a-zA-Z!][^<>]*>", " ", text))
    text = FOOTER.split(text)[0]
    for pattern in LEAKS:
        text = re.sub(pattern, "", text)
    text = unicodedata.normalize("NFKC", text.translate(QUOTES))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    text = text.lstrip(" .")
    return text if len(text) <= limit else text[: limit + 1].rpartition(" ")[0]


def shingles(text: str) -> set[tuple[str, ...]]:
    """Every run of three words."""
    words = normalised(text).split()
    return set(zip(words, words[1:], words[2:], strict=False))


def without_near_duplicates(rows: Iterable[Row], threshold: float = 0.3) -> list[Row]:
    """Rows whose shingles overlap (Jaccard) by less than `threshold` with those of every row kept before."""
    kept, sizes, holders = [], [], defaultdict(list)
    for row in rows:
        own = shingles(row[0])
        shared = Counter(number for shingle in own for number in holders[shingle])
        overlaps = (n / (len(own) + sizes[number] - n) for number, n in shared.items())
        if max(overlaps, default=0.0) < threshold:
            for shingle in own:
                holders[shingle].append(len(kept))
            kept.append(row)
            sizes.append(len(own))
    return kept


def spam_rows(files: dict[str, bytes]) -> list[Row]:
    """English message bodies of 80 to 500 characters, each with "spam" or "ham"."""
    rows = []
    for path in sorted(files):
        found = re.fullmatch(r"data/(easy-ham|hard-ham|spam)-\d/.*\.txt", path)
        if not found:
            continue
        raw = message_text(files[path])
        text = clean_message(raw)
        feed = re.match(r"\s*URL: \S+\s+Date: ", raw)
        if not feed and text.isascii() and len(text) >= 80 and not UNWANTED.search(text):
            rows.append((text, "spam" if found[1] == "spam" else "ham"))
    return without_near_duplicates(shuffled(rows))
