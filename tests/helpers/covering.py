"""Tables of options in which any two, or any three, of their values stand together."""

from itertools import combinations, product


def covering(options, valid, strength):
    """Rows of options, with each valid combination of so many values in one of them at least.

    Args:
        options: The values of each option, by its name.
        valid: Whether a row may be, of a dict of some of the options: one that may not be may not
            be with more of them either, and one that may be can be completed.
        strength: How many values stand together, 2 or 3.

    Returns:
        Dicts of all options, the same ones every time.
    """
    missing = {}
    for names in combinations(options, strength):
        for values in product(*(range(len(options[name])) for name in names)):
            part = dict(zip(names, values, strict=True))
            if valid(_named(options, part)):
                missing[frozenset(part.items())] = part
    rows = []
    while missing:
        row = dict(next(iter(missing.values())))
        for name in options:
            if name not in row:
                tried = [row | {name: value} for value in range(len(options[name]))]
                able = [one for one in tried if valid(_named(options, one))]
                row = max(able, key=lambda one: sum(p in missing for p in _parts(one, strength)))
        for key in _parts(row, strength):
            missing.pop(key, None)
        rows.append({name: options[name][row[name]] for name in options})
    return rows


def _parts(row, strength):
    return map(frozenset, combinations(row.items(), strength))


def _named(options, part):
    return {name: options[name][value] for name, value in part.items()}
