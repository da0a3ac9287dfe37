"""Static cycles of a TPU program, counted in the final VLIW bundles that its compiler dumps.

A TensorCore issues one bundle a cycle. The dump (`*-final_bundles.txt`) lists the bundles with the
scalar code that steers them, and that code depends on nothing but constants: loop counters, grid
indices, `pl.when` on either. So it is run here, without the vectors, and each bundle is counted as
often as it is reached. Whatever a branch depends on that is not known when the program is compiled
is an error, never a guess.

What the count leaves out: waiting (for a copy between HBM and VMEM, for a result of the matrix
unit that is not ready, for instructions to be fetched) and the program around the computations.
So it is the compiler's static figure and a lower bound of a measurement.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

SLOTS = (
    "MXU",
    "XLU",
    "VALU",
    "VPOP",
    "EUP",
    "VLOAD",
    "VLOAD:FILL",
    "VSTORE",
    "VSTORE:SPILL",
    "SALU",
)
"""Units of a TensorCore as the compiler's utilisation table names them, in its order.

`VLOAD:FILL` and `VSTORE:SPILL` are the loads and stores that bring spilled registers back and
forth; they are counted within `VLOAD` and `VSTORE` too.
"""

_LIMIT = 50_000_000
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})?: *(>*) *\{(.*)", re.DOTALL)
_NEXT = re.compile(r"^(?= *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?: )", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
# libtpu of JAX 0.10 calls it "core id", that of 0.11 "megacore core id :: core id".
_CORE = re.compile(r"/\* (?:[^*]* :: )?(?:megacore )?core id (?::: [^*]*)?\*/")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_END = re.compile(r"(?:End|Start/End empty) region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)%(\w+)\))? *target = \$region(\d+)")
_SCALAR = re.compile(r"^%(\w+_[sp]\d+) = ([\w.]+) *(.*)$", re.DOTALL)
_SPILL = re.compile(r"\[smem:\[#(\w+_spill)\]\]")
_STORE = re.compile(r"^%\w+ = sst \[smem:\[#(\w+_spill)\]\] *(?:\((!?)%(\w+)\),)? *(%\w+|\d+)$")
_NAME = re.compile(r"^%(\w+)$")
_ENTRY = re.compile(r"/\* entry bundle: %([\w.-]+) = ")
_CALL = re.compile(r"= (?:inlined_)?call [^/]*/\* %([\w.-]+) = ")
_DELAY = re.compile(r"= vdelay (\d+)")

Value = int | None
"""A value of the program, None where it is not known when the program is compiled."""


class Loop(NamedTuple):
    """A loop of a computation: where it is and what its own bundles, inner loops apart, cost.

    `address` is that of its first bundle, `depth` 1 for an outermost loop and 0 for the code in no
    loop. `entries` says how often it starts, `trips` how many iterations it makes in all,
    `bundles` how many bundles its body has, `cycles` how many of them are executed in all.
    `slots` holds the operations that they issue, by unit.
    """

    address: int
    depth: int
    entries: int
    trips: int
    bundles: int
    cycles: int
    slots: dict[str, int]


class Count(NamedTuple):
    """Static cycles of one computation, of its loops, and the operations by unit."""

    name: str
    cycles: int
    loops: list[Loop]
    slots: dict[str, int]
    capacity: dict[str, int]

    @property
    def busy(self) -> dict[str, float]:
        """The share of each unit's slots that the computation fills.

        Example:
            >>> Count("f", 10, [], {"VALU": 30, "XLU": 2}, {"VALU": 4, "XLU": 2}).busy
            {'VALU': 0.75, 'XLU': 0.1}
        """
        return {
            unit: used / (self.cycles * self.capacity[unit])
            for unit, used in self.slots.items()
            if self.capacity.get(unit)
        }


class _Operation(NamedTuple):
    """A scalar instruction: what it defines, and the predicate under which it does."""

    target: str
    opcode: str
    arguments: tuple[str, ...]
    predicate: str | None
    negated: bool


class _Branch(NamedTuple):
    at: int
    predicate: str | None
    negated: bool
    region: str


class _Program(NamedTuple):
    name: str
    operations: list[list[_Operation]]
    delays: list[int]
    branches: list[_Branch]
    starts: dict[str, int]
    ends: dict[str, int]
    calls: list[str]
    ends_labelled: bool


def called(text: str) -> list[str]:
    """Names of the computations that the program around them calls, in its order.

    Args:
        text: The `*-TLP-*-final_bundles.txt` of a program.

    Raises:
        ValueError: The program has a loop around its calls.

    Example:
        >>> called("   0   :  { %7 = inlined_call %s1_s0 /* %f.1 = custom-call(%x) */ }")
        ['f.1']
    """
    program = _parse(text)
    for branch in program.branches:
        if program.starts.get(branch.region, branch.at + 1) <= branch.at:
            raise ValueError(f"a loop around computations, from region {branch.region}")
    return program.calls


def name_of(text: str) -> str | None:
    """Name of the computation whose bundles a text lists; None for the program around them.

    Example:
        >>> name_of("   0   :  {} /* entry bundle: %f.1 = custom-call(%x) */")
        'f.1'
    """
    found = _ENTRY.search(text)
    return found and found[1]


def count(text: str, utilisation: str | None = None, delay_slots: int = 4) -> Count:
    """Counts the cycles of one computation.

    Args:
        text: Its `*-final_bundles.txt`.
        utilisation: Its `*-final_hlo-static-per-bundle-utilization.txt`; without it `slots` and
            `capacity` stay empty.
        delay_slots: How many bundles after a branch are executed before it takes effect: one on a
            v4, four on later chips.

    Returns:
        Cycles, and the loops in the order of their first bundle, the code in no loop first.

    Raises:
        ValueError: A branch depends on something that is not known when the program is compiled,
            or the text is not of the expected form.

    Example:
        >>> text = '''
        ...    0   :  { %s1_s0 = smov 0  ;;  %9 = vdelay 2 }
        ...  0x1 LB: > { %s2_s0 = sphi %s1_s0, %s3_s0 } /* Start region 5 */
        ...  0x2   : > { %s3_s0 = sadd.s32 1, %s2_s0 }
        ...  0x3   : > { %p4_p0 = scmp.ge.s32.totalorder %s3_s0, 10 }
        ...  0x4   : > { %5 = sbr.rel (!%p4_p0) target = $region5 }
        ...  0x5   : > { %6 = vst [vmem:[#allocation1] sm:$0xff] %v7_v0 } /* End region 5 */
        ...  0x6   :  {}'''
        >>> total = count(text, delay_slots=1)
        >>> total.cycles, total.loops[1].trips, total.loops[1].bundles
        (54, 10, 5)
    """
    program = _parse(text)
    times, jumps = _executed(program, delay_slots)
    costs = [1 + delay for delay in program.delays]
    cycles = sum(t * cost for t, cost in zip(times, costs, strict=True))
    capacity, used = _utilisation(utilisation, len(times))
    loops = _loops(program, delay_slots, times, jumps, costs, used)
    slots = _slots(range(len(times)), times, used)
    return Count(program.name, cycles, loops, slots, capacity)


def _parse(text: str) -> _Program:
    pieces = _NEXT.split(text)
    labelled = re.match(r" *0x\w+ PF: +\{\} /\* exit bundle", pieces[-1]) is not None
    program = _Program(name_of(text) or "", [], [], [], {}, {}, [], labelled)
    for piece in pieces:
        found = _BUNDLE.match(piece)
        if found is None:
            continue
        at = len(program.operations)
        if int(found[1], 16) != at:
            raise ValueError(f"{program.name}: bundle {found[1]}, expected {at:#x}")
        _read_bundle(found[3], at, program)
    if not program.operations:
        raise ValueError("a text without bundles")
    return program


def _read_bundle(body: str, at: int, program: _Program) -> None:
    comment = body[body.rfind("}") + 1 :]
    for region in _START.findall(comment):
        program.starts.setdefault(region, at)
    for region in _END.findall(comment):
        program.ends[region] = at
    program.delays.append(sum(map(int, _DELAY.findall(body))))
    operations: list[_Operation] = []
    program.operations.append(operations)
    # Nearly all text is of vectors, which steer nothing.
    if "_s" not in body and "_p" not in body and "sbr" not in body and "call" not in body:
        return
    program.calls.extend(_CALL.findall(body))
    for piece in body[: body.rfind("}")].split(" ;; "):
        # Of the cores that share a program, the first one is counted.
        core = _CORE.search(piece) is not None
        code = _COMMENT.sub("", piece).strip()
        if "sbr." in code:
            program.branches.append(_branch(code, at))
        elif (operation := _operation(code, core)) is not None:
            operations.append(operation)
    # What a loop brings along is there before anything else in its first bundle is done.
    operations.sort(key=lambda operation: operation.opcode != "sphi")


def _branch(code: str, at: int) -> _Branch:
    found = _BRANCH.search(code)
    if found is None:
        raise ValueError(f"bundle {at:#x}: unknown branch {code!r}")
    return _Branch(at, found[2], found[1] == "!", found[3])


def _operation(code: str, core: bool) -> _Operation | None:
    stored = _STORE.match(code)
    if stored:
        return _Operation(stored[1], "smov", (stored[4],), stored[3], stored[2] == "!")
    found = _SCALAR.match(code)
    if found is None:
        return None
    target, opcode, rest = found.groups()
    predicate, negated = None, False
    guard = re.search(r"\((!?)%(\w+)(?:, *(%\w+))?\)(?:, *)?", rest)
    arguments = rest if guard is None else rest[: guard.start()] + rest[guard.end() :]
    parts = tuple(part.strip() for part in arguments.split(",") if part.strip())
    if guard is not None:
        predicate, negated = guard[2], guard[1] == "!"
        if guard[3] is not None:
            # Under the predicate the argument, otherwise what is named beside the predicate.
            parts, opcode, predicate = (f"%{predicate}", *parts, guard[3]), "pick", None
            if negated:
                parts, negated = (parts[0], parts[2], parts[1]), False
    if opcode == "sld":
        # A spilled scalar comes back from where `sst` put it; other loads are of unknown data.
        spilled = _SPILL.search(rest)
        parts = (f"%{spilled[1]}",) if spilled else ("0" if core else "unknown",)
    return _Operation(target, opcode, parts, predicate, negated)


def _needed(program: _Program) -> list[list[_Operation]]:
    """The operations on which some branch depends, bundle by bundle."""
    definitions: dict[str, list[_Operation]] = {}
    for operation in (o for bundle in program.operations for o in bundle):
        definitions.setdefault(operation.target, []).append(operation)
    wanted = {b.predicate for b in program.branches if b.predicate is not None}
    queue = list(wanted)
    while queue:
        for operation in definitions.get(queue.pop(), []):
            names = {argument[1:] for argument in operation.arguments if argument[0] == "%"}
            names |= {operation.predicate} if operation.predicate else set()
            queue += names - wanted
            wanted |= names
    return [[o for o in bundle if o.target in wanted] for bundle in program.operations]


def _executed(program: _Program, slots: int) -> tuple[list[int], dict[tuple[int, int], int]]:
    """Counts the executions of each bundle and of each jump (last bundle, target)."""
    blocks = _blocks(program, slots)
    number = {first: i for i, (first, _, _) in enumerate(blocks)}
    needed = _needed(program)
    code = [[o for at in range(first, last + 1) for o in needed[at]] for first, last, _ in blocks]
    evaluate = [_compiled(operations) for operations in code]
    visits = [0] * len(blocks)
    jumps: dict[tuple[int, int], int] = {}
    state: dict[str, Value] = {}
    i, total = 0, 0
    while i < len(blocks):
        visits[i] += 1
        total += 1
        if total > _LIMIT:
            raise ValueError(f"{program.name}: more than {_LIMIT} jumps, expected an end")
        evaluate[i](state)
        _, last, branch = blocks[i]
        i += 1
        if branch is not None and _taken(branch, state, program.name):
            target = _target(program, branch)
            jumps[last, target] = jumps.get((last, target), 0) + 1
            i = number[target]
    times: list[int] = []
    for (first, last, _), n in zip(blocks, visits, strict=True):
        times += [n] * (last + 1 - first)
    return times, jumps


def _taken(branch: _Branch, state: dict[str, Value], name: str) -> bool:
    if branch.predicate is None:
        return True
    value = state.get(branch.predicate)
    if value is None:
        raise ValueError(
            f"{name}: the branch in bundle {branch.at:#x} depends on {branch.predicate}, which is "
            "not known when the program is compiled"
        )
    return bool(value) != branch.negated


def _target(program: _Program, branch: _Branch) -> int:
    if branch.region not in program.starts:
        if program.ends_labelled:
            # The last bundle's comment names the computation in place of the region.
            return len(program.operations) - 1
        raise ValueError(f"{program.name}: a branch to region {branch.region}, which is not there")
    return program.starts[branch.region]


def _blocks(program: _Program, slots: int) -> list[tuple[int, int, _Branch | None]]:
    """Straight runs of bundles: first, last, and the branch that takes effect at the end."""
    size = len(program.operations)
    ends = {min(branch.at + slots, size - 1): branch for branch in program.branches}
    if len(ends) < len(program.branches):
        raise ValueError(f"{program.name}: two branches take effect in one bundle")
    firsts = {0} | {end + 1 for end in ends} | {_target(program, b) for b in program.branches}
    firsts.discard(size)
    for end, branch in ends.items():
        if end not in program.ends.values() and end + 1 not in program.starts.values():
            raise ValueError(
                f"{program.name}: no region ends {slots} bundles after the branch in "
                f"{branch.at:#x}, expected one to end with the last bundle before it takes effect"
            )
        inside = [at for at in range(branch.at + 1, end + 1) if at in firsts]
        if inside or any(branch.at < other.at <= end for other in program.branches):
            raise ValueError(f"{program.name}: a jump into the shadow of that in {branch.at:#x}")
    starts = sorted(firsts)
    lasts = [at - 1 for at in starts[1:]] + [size - 1]
    return [(first, last, ends.get(last)) for first, last in zip(starts, lasts, strict=True)]


def _compiled(operations: Iterable[_Operation]) -> Callable[[dict[str, Value]], None]:
    """A function that carries operations out on the state: values by name, None for unknown."""
    steps = [(o, _FUNCTIONS.get(o.opcode, _unknown)) for o in operations]

    def evaluate(state: dict[str, Value]) -> None:
        for operation, function in steps:
            _, _, register = operation.target.rpartition("_")
            if operation.opcode == "sphi":
                value = state.get(register)
            else:
                value = function(*[_value(a, state) for a in operation.arguments])
            if operation.predicate is not None:
                guard = state.get(operation.predicate)
                if guard is None:
                    value = None
                elif bool(guard) == operation.negated:
                    continue
            state[operation.target] = state[register] = value

    return evaluate


def _value(argument: str, state: dict[str, Value]) -> Value:
    if argument[0] == "%":
        return state.get(argument[1:])
    try:
        return _signed(int(argument, 0))
    except ValueError:
        return None


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def _unknown(*_: Value) -> None:
    return None


def _strict(function: Callable[..., int]) -> Callable[..., Value]:
    """The function on known arguments; unknown if one of them is."""

    def wrapped(*arguments: Value) -> Value:
        return None if None in arguments else function(*arguments)

    return wrapped


def _pick(predicate: Value, on_true: Value, on_false: Value) -> Value:
    if predicate is None:
        return on_true if on_true == on_false else None
    return on_true if predicate else on_false


def _and(left: Value, right: Value) -> Value:
    if None in (left, right):
        return False if False in (left, right) else None
    return bool(left) and bool(right)


def _or(left: Value, right: Value) -> Value:
    return _not(_and(_not(left), _not(right)))


def _not(value: Value) -> Value:
    return None if value is None else not value


def _unsigned(value: int) -> int:
    return value & 0xFFFFFFFF


_COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_ARITHMETIC = {
    "sadd.s32": lambda a, b: a + b,
    "ssub.s32": lambda a, b: a - b,
    "smul.u32": lambda a, b: a * b,
    "sand.u32": lambda a, b: a & b,
    "sor.u32": lambda a, b: a | b,
    "sxor.u32": lambda a, b: a ^ b,
    "sshll.u32": lambda a, b: a << (b & 31),
    "sshrl.u32": lambda a, b: _unsigned(a) >> (b & 31),
    "sshra.s32": lambda a, b: a >> (b & 31),
    "smin.s32": min,
    "smax.s32": max,
    "smin.u32": lambda a, b: min(a, b, key=_unsigned),
    "smax.u32": lambda a, b: max(a, b, key=_unsigned),
}


def _functions() -> Iterator[tuple[str, Callable[..., Value]]]:
    for name, function in _ARITHMETIC.items():
        yield name, _strict(lambda a, b, f=function: _signed(f(a, b)))
    for name, function in _COMPARISONS.items():
        yield f"scmp.{name}.s32.totalorder", _strict(function)
        yield (
            f"scmp.{name}.u32.totalorder",
            _strict(lambda a, b, f=function: f(_unsigned(a), _unsigned(b))),
        )
    yield "smov", lambda a: a
    yield "sld", lambda *a: a[0] if len(a) == 1 else None
    yield "pick", _pick
    yield "scalar_select", _pick
    yield "por", _or
    yield "pand", _and
    yield "pnand", lambda a, b: _not(_and(a, b))
    yield "pnor", lambda a, b: _not(_or(a, b))
    yield "pneg", _not
    yield "pmov", lambda a: a


_FUNCTIONS: dict[str, Callable[..., Value]] = dict(_functions())


def _utilisation(
    text: str | None, bundles: int
) -> tuple[dict[str, int], list[tuple[int, ...]] | None]:
    """Slots by unit, and for each bundle how many of them it fills."""
    if text is None:
        return {}, None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    names = tuple(name.strip() for name in lines[1].split(","))
    rows = [tuple(map(int, line.split())) for line in lines[4:]]
    if names != SLOTS or len(rows) != bundles:
        raise ValueError(
            f"a utilisation of {len(rows)} bundles and units {names}, expected {bundles}, {SLOTS}"
        )
    return dict(zip(names, map(int, lines[2].split()), strict=True)), rows


def _slots(
    places: Iterable[int], times: list[int], used: list[tuple[int, ...]] | None
) -> dict[str, int]:
    if used is None:
        return {}
    totals = [0] * len(SLOTS)
    for at in places:
        if times[at]:
            totals = [total + times[at] * n for total, n in zip(totals, used[at], strict=True)]
    return dict(zip(SLOTS, totals, strict=True))


def _loops(
    program: _Program,
    slots: int,
    times: list[int],
    jumps: dict[tuple[int, int], int],
    costs: list[int],
    used: list[tuple[int, ...]] | None,
) -> list[Loop]:
    everything = (0, len(times) - 1)
    spans: set[tuple[int, int]] = set()
    for branch in program.branches:
        first, last = _target(program, branch), min(branch.at + slots, everything[1])
        if first <= branch.at:
            spans.add((first, last))
    loops = []
    for first, last in [everything, *sorted(spans, key=lambda span: (span[0], -span[1]))]:
        within = [s for s in spans if first <= s[0] and s[1] <= last and s != (first, last)]
        own = [at for at in range(first, last + 1) if not any(a <= at <= b for a, b in within)]
        loops.append(
            Loop(
                first,
                sum(a <= first and last <= b for a, b in spans),
                times[first] - jumps.get((last, first), 0),
                times[first],
                sum(costs[at] for at in own),
                sum(times[at] * costs[at] for at in own),
                _slots(own, times, used),
            )
        )
    return loops
