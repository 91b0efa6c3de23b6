"""An edit at a random place of a tree of dictionaries and lists: values dropped, renamed, replaced, added."""

from collections.abc import Callable, Iterator
from random import Random

Leaf = Callable[[Random, object], object]  # another value for the one that stands there


def mutate(rng: Random, tree, leaf: Leaf, edits: int | None = None):
    """A copy of the tree with one to three edits, mostly one; its leaves are shared, never changed."""
    tree = [_copy(tree)]  # so that the root has a place too
    for _ in range(edits or rng.choice((1, 1, 1, 1, 2, 3))):
        places = list(_places(tree))
        inner = [place for place in places if place[0] is not tree]
        place = rng.choice(inner) if inner and rng.random() < 0.98 else places[0]
        rng.choice((_replace, _replace, _replace, _drop, _rename, _add, _wrap, _take))(
            rng, place, places, leaf
        )
        if not tree:
            tree.append(None)
    return tree[0]


def _copy(tree):
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _places(tree) -> Iterator[tuple[dict | list, object]]:
    """Every (container, key or index), from the root down."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _replace(rng, place, places, leaf):
    container, key = place
    container[key] = leaf(rng, container[key])


def _drop(rng, place, places, leaf):
    container, key = place
    del container[key]


def _rename(rng, place, places, leaf):
    """Give a value another key, or another place in its list; the order stays as it is elsewhere."""
    container, key = place
    if isinstance(container, list):
        container.insert(rng.randrange(len(container)), container.pop(key))
        return
    items = list(container.items())
    container.clear()
    container.update((_other_key(rng, k, items) if k == key else k, value) for k, value in items)


def _add(rng, place, places, leaf):
    container, key = place
    value = leaf(rng, container[key])
    if isinstance(container, list):
        container.insert(key, value)
    else:
        container[_other_key(rng, key, list(container.items()))] = value


def _wrap(rng, place, places, leaf):
    container, key = place
    value = container[key]
    deep = value
    for _ in range(rng.choice((1, 1, 2, 30))):
        deep = [deep] if rng.random() < 0.5 else {"0": deep}
    container[key] = deep


def _take(rng, place, places, leaf):
    """A value that stands elsewhere in the tree; a copy, or the tree would hold itself."""
    container, key = place
    other, at = rng.choice(places)
    container[key] = _copy(other[at])


def _other_key(rng: Random, key, items: list):
    """A key near this one: longer, shorter, of another case, or a neighbour's; mostly of the same type."""
    if isinstance(key, int):
        return rng.choice((key + 1, -1, 10**6, str(key), key + len(items)))
    text = str(key)
    near = [f"{text}x", text[:-1], text.upper(), f"module.{text}", f"{text}.weight", "", f" {text}", "\x00"]
    near += [text.replace("0", "1"), text.replace("A", "B"), text.replace("_", ".")]
    return rng.choice([*near, rng.choice(items)[0]])
