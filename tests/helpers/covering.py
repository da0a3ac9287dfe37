"""Tables of options in which any two of their values, or any three, stand together."""

from itertools import combinations, product


def covering(options, valid, together):
    """Rows of options, with each valid combination of some values in one of them at least.

    Args:
        options: The values of each option, by its name.
        valid: Whether a row may be, of a dict of some of the options: one that may not be may not
            be with more of them either, and one that may be can be completed.
        together: How many values a combination has.

    Returns:
        Dicts of all options, the same ones every time.
    """
    missing = {}
    for names in combinations(options, together):
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
                row = max(
                    able, key=lambda one: sum(key in missing for key in _parts(one, together))
                )
        for key in _parts(row, together):
            missing.pop(key, None)
        rows.append({name: options[name][row[name]] for name in options})
    return rows


def _parts(row, together):
    return map(frozenset, combinations(row.items(), together))


def _named(options, part):
    return {name: options[name][value] for name, value in part.items()}
