"""The same kernels called with sizes that are known at run time only, for ablation.py.

The C that flashlite generates for a model has its sizes as an enum and its tensors as constant
tables, so that a compiler may fold them into the loops that use them. `with_runtime_shapes`
rewrites that text, and nothing else, so that it cannot:

1. Every file-scope `static const` table or number becomes a plain global: other translation units
   could write to it, so that its value is read from memory when it is used.
2. Inside functions every name of the enum is read from a volatile struct instead.

The enum itself stays, since C wants constants for the lengths of arrays and for initializers.
"""

from __future__ import annotations

import re

__all__ = ["with_runtime_shapes"]

_ENUM = re.compile(r"^enum \{\n(?P<body>(?:    \w+ = \d+,\n)+)\};\n", re.MULTILINE)
_CONSTANT = re.compile(r"^static const (?=\w+ \w+(?:\[[^\]]*\])? = )", re.MULTILINE)
_FUNCTION = re.compile(r"^static \w+ \w+\([^;{]*\) \{\n.*?^\}\n", re.MULTILINE | re.DOTALL)


def with_runtime_shapes(model_c: str) -> str:
    """A `model.c` that computes the same without the compiler knowing its sizes.

    Raises:
        ValueError: the text is not of the form that flashlite generates.
    """
    found = _ENUM.search(model_c)
    if found is None:
        raise ValueError("model.c has no enum of sizes")
    sizes = dict(re.findall(r"(\w+) = (\d+)", found["body"]))
    members = "\n".join(f"    int32_t {name};" for name in sizes)
    values = ", ".join(f".{name} = {value}" for name, value in sizes.items())
    struct = f"\nstatic volatile struct {{\n{members}\n}} SIZES = {{{values}}};\n"
    text = model_c.replace(found[0], found[0] + struct, 1)
    text, constants = _CONSTANT.subn("", text)
    if not constants:
        raise ValueError("model.c has no constant tables")
    names = re.compile(r"\b(" + "|".join(sizes) + r")\b")
    text, functions = _FUNCTION.subn(lambda body: names.sub(r"SIZES.\1", body[0]), text)
    if not functions:
        raise ValueError("model.c has no functions")
    return text
