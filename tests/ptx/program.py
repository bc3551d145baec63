"""PTX text into a `Program`: registers, parameters and basic blocks of parsed instructions.

Only what LLVM writes for Triton's kernels is read: one entry function, no calls, no local memory. Anything else raises
`Unsupported` with its line, because an instruction that is skipped or guessed would make every later result worthless.
"""

import re
from typing import NamedTuple

from tests.ptx.arithmetic import Unsupported

SPECIAL_REGISTERS = ("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z",
                     "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid")  # fmt: skip
IGNORED_DIRECTIVES = (".version", ".target", ".address_size", ".extern", ".global", ".pragma", ".reqntid", ".maxntid",
                      ".minnctapersm", ".maxnreg", ".noreturn")  # fmt: skip
FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
REGISTERS = re.compile(r"\.reg\s+\.(pred|b16|b32|b64)\s+%(\w+)<(\d+)>")
PARAMETER = re.compile(r"\.param\s+\.([bfsu]\d+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?(\w+)")
ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\(")
LABEL = re.compile(r"([$\w]+):$")
TARGET = re.compile(r"\bbra(?:\.uni)?\s+([$\w]+)")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
GUARD = re.compile(r"@(!?)(%\w+)\s+")
MEMORY = re.compile(r"([%\w.$]+)\s*(?:\+\s*(-?\d+))?")


class Register(NamedTuple):
    """A virtual register; ``kind`` is pred, b16, b32 or b64."""

    name: str
    kind: str


class Immediate(NamedTuple):
    """A constant, as it is written."""

    text: str


class Address(NamedTuple):
    """``[base + offset]``; the base is a register, or the name of a parameter or of shared memory."""

    base: "Register | str"
    offset: int


class Vector(NamedTuple):
    """``{a, b, ...}``, or ``a|b`` of predicates; None stands for ``_``, a part that is dropped."""

    items: tuple["Register | Immediate | None", ...]


class Symbol(NamedTuple):
    """A label, a special register, or the name of shared memory."""

    name: str


Operand = Register | Immediate | Address | Vector | Symbol


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        opcode: with all its modifiers, such as ``ld.global.v4.b32``.
        operands: as written, destination first.
        guard: the predicate register that decides for each thread, or None.
        negated: whether the guard must be false.
        line: in the PTX text, from 1.
        text: as written.
        source: file and line of the Python code.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    text: str
    source: str


class Program(NamedTuple):
    """One kernel.

    Attributes:
        name: of the entry function.
        parameters: name and type (``u64``, ``f32``, ...) of each parameter.
        registers: all that are declared.
        blocks: basic blocks; control falls from each into the next.
        labels: the block that follows each label.
    """

    name: str
    parameters: dict[str, str]
    registers: list[Register]
    blocks: list[list[Instruction]]
    labels: dict[str, int]


class _Operands(dict[str, Operand]):
    """Operands by their text: registers as they are declared, everything else when it is first met."""

    def __missing__(self, text: str) -> Operand:
        self[text] = _operand(text, self)
        return self[text]


def parse(ptx: str) -> Program:
    """Parse the PTX of one kernel.

    Raises:
        Unsupported: an unknown directive or operand, with its line.
    """
    files = {number: "/".join(filter(None, path)) for number, *path in FILE.findall(ptx)}
    jumped_to = set(TARGET.findall(ptx))  # most labels are for debuggers, and no block begins there
    name = ""
    parameters = {}
    registers: list[Register] = []
    operands = _Operands()
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    source = "?"
    header = True
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.partition("//")[0].strip()
        if not text or text in ("}", ")"):
            continue
        if text.startswith("."):
            if text.startswith(".section"):  # debug information, to the end
                break
            if text.startswith((".loc\t", ".loc ")):
                _, file, source_line, *_ = text.split(maxsplit=3)
                source = f"{files.get(file, '?')}:{source_line}"
            elif match := REGISTERS.match(text):
                kind, prefix, count = match.groups()
                declared = [Register(f"%{prefix}{i}", kind) for i in range(int(count))]
                registers += declared
                operands.update((register.name, register) for register in declared)
            elif match := ENTRY.match(text):
                name = match[1]
            elif header and (match := PARAMETER.match(text)):
                parameters[match[2]] = match[1]
            elif not text.startswith((".file", *IGNORED_DIRECTIVES)):
                raise Unsupported(f"PTX line {number}: directive {text!r}")
        elif text == "{":
            header = False
        elif match := LABEL.match(text):
            if match[1] in jumped_to:
                if blocks[-1]:
                    blocks.append([])
                labels[match[1]] = len(blocks) - 1
        else:
            for statement in filter(None, map(str.strip, text.split(";"))):
                instruction = _instruction(statement, number, source, operands)
                blocks[-1].append(instruction)
                if instruction.opcode.partition(".")[0] in ("bra", "ret"):
                    blocks.append([])
    if not name:
        raise Unsupported("no .visible .entry in the PTX")
    return Program(name, parameters, registers, blocks, labels)


def _instruction(text: str, line: int, source: str, known: _Operands) -> Instruction:
    rest = text
    guard = None
    negated = False
    if match := GUARD.match(text):
        guard = known[match[2]]
        assert isinstance(guard, Register)
        negated = match[1] == "!"
        rest = text[match.end() :]
    opcode, _, arguments = rest.replace("\t", " ").partition(" ")
    try:
        operands = tuple([known[operand.strip()] for operand in OPERAND.findall(arguments)])
    except Unsupported as error:
        raise Unsupported(f"PTX line {line}: {text!r}: {error}") from None
    return Instruction(opcode, operands, guard, negated, line, text, source)


def _operand(text: str, known: _Operands) -> Operand:
    if text.startswith("{") or "|" in text:
        items = (item.strip() for item in re.split(r"[,|]", text.strip("{}")))
        return Vector(tuple(None if item == "_" else known[item] for item in items))
    if text.startswith("["):
        match = MEMORY.fullmatch(text[1:-1].strip())
        if not match:
            raise Unsupported(f"address {text}")
        base = known.get(match[1])
        return Address(base if isinstance(base, Register) else match[1], int(match[2] or 0))
    if re.fullmatch(r"-?\d+U?|0x[0-9A-Fa-f]+U?|0[fd][0-9A-Fa-f]+", text):
        return Immediate(text)
    if text in SPECIAL_REGISTERS or re.fullmatch(r"[$A-Za-z_][$\w]*", text):
        return Symbol(text)
    raise Unsupported(f"operand {text}")
