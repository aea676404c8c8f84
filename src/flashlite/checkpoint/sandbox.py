"""The sandbox chat templates run in: Jinja programs, run as if an enemy had written them.

A template is refused unless every construct in it is on a list. What is left cannot reach Python
objects, but it could still run for hours or fill the memory, so before it is compiled its loops,
joins, comparisons and literals are rewritten to pass through a `Meter`, and calls, filters and
arithmetic are intercepted: each step costs, each text and list has a largest size, and a run that
has used up its steps or its processor time ends with an error. So a template may run in process,
at no cost per request; the first time it runs is in a limited child (`tokenizer_check`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from types import BuiltinMethodType
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError, nodes
from jinja2.environment import Template
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from flashlite.errors import TemplateError

__all__ = ["Meter", "Program", "compile_program"]

_MAX_SOURCE = 1 << 15  # characters of a template; the longest known have 17,000
_MAX_NODES = 1 << 12  # of its syntax tree; the largest known have 1,300
_MAX_TEXT = 1 << 19  # characters a template may make, besides those it is given
_MAX_STEPS = 50_000
_MAX_ITEMS = 10_000
_MAX_DEPTH = 16  # macros within macros
_MAX_BITS = 256  # of an integer
_MAX_SECONDS = 0.05  # of this thread's processor time
_SECONDS_PER_VALUE = 0.001
_SECONDS_PER_CHARACTER = 1e-6
_SCOPES = ("_loop_vars", "_block_vars")  # what Jinja adds to the arguments of a call
_PLAIN_FORMAT = re.compile(r"(?:[^{}]|\{\{|\}\}|\{[0-9]?\})*")
_DATE_FORMAT = re.compile(r"(?:%-?[A-Za-z%]|[^%]){0,64}")

_ALLOWED_NODES: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Scope, nodes.With),
    *(nodes.For, nodes.If, nodes.Break, nodes.Continue, nodes.Macro),
    *(nodes.Assign, nodes.AssignBlock, nodes.Name, nodes.NSRef, nodes.Const),
    *(nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Slice),
    *(nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
    *(nodes.Concat, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod),
    *(nodes.Neg, nodes.Pos, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr),
)
_ALLOWED_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items"),
    *("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("round", "select", "selectattr", "sort", "title", "trim", "unique", "upper"),
)
_OWN_FILTERS = ("indent", "join", "replace", "safe", "string", "tojson")
_ALLOWED_TESTS = (
    *("boolean", "defined", "divisibleby", "eq", "equalto", "even", "false", "float", "ge", "gt"),
    *("in", "integer", "iterable", "le", "lower", "lt", "mapping", "ne", "none", "number", "odd"),
    *("sequence", "string", "true", "undefined", "upper", "==", "!=", "<", "<=", ">", ">="),
)
_ALLOWED_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            *("capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"),
            *("isdigit", "islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip"),
            *(
                "partition",
                "removeprefix",
                "removesuffix",
                "replace",
                "rfind",
                "rpartition",
                "rsplit",
                "rstrip",
            ),
            *("split", "splitlines", "startswith", "strip", "title", "upper"),
        )
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}


class Program:
    """A checked, compiled template."""

    def __init__(self, template: Template, literals: tuple[str, ...]) -> None:
        self._template = template
        self.literals = literals  # every text that stands in the source

    def run(self, variables: Mapping[str, Any], *, values: int, characters: int) -> str:
        """What the template writes.

        Args:
            variables: what it can name.
            values: how many messages it is given; more may take longer.
            characters: how long their texts are.

        Raises:
            TemplateError: it gives up itself, fails, or uses more steps, time or memory than it
                may.
        """
        meter = Meter(values, characters)
        context = self._template.new_context(
            {
                **variables,
                "__meter": meter,
                "__each": meter.each,
                "__join": meter.join,
                "__plain": meter.plain,
            }
        )
        try:
            return "".join(self._template.root_render_func(context))
        except TemplateError:
            raise
        except Exception as error:
            raise _failure(error, "failed") from None


def compile_program(source: str) -> Program:
    """Check and compile a template.

    Raises:
        TemplateError: it is too long, is not Jinja, or uses what is not allowed.
    """
    if len(source) > _MAX_SOURCE:
        raise TemplateError(f"chat template has {len(source)} characters, allowed {_MAX_SOURCE}")
    environment = _Environment()
    try:
        tree = environment.parse(source)
        literals = tuple(_check(tree))
        code = environment.compile(_Metering().visit(tree))
        return Program(Template.from_code(environment, code, environment.globals), literals)
    except TemplateError:
        raise
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"chat template line {error.lineno}: {_printable(error.message or '')}"
        ) from None
    except Exception as error:  # nesting too deep for Python, and the like
        raise _failure(error, "cannot be compiled") from None


class Meter:
    """What one run has used, and may still use."""

    def __init__(self, values: int, characters: int) -> None:
        self.steps = _MAX_STEPS + 100 * values + 4 * characters
        self.room = _MAX_TEXT + 4 * characters  # characters of output still allowed
        self.longest = _MAX_TEXT + 4 * characters  # of any one text
        self.depth = 0
        self.end = (
            time.thread_time()
            + _MAX_SECONDS
            + _SECONDS_PER_VALUE * values
            + _SECONDS_PER_CHARACTER * characters
        )

    def step(self, count: int = 1) -> None:
        """Pay for work about to be done."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateError(f"chat template takes more than {_MAX_STEPS} steps")
        if time.thread_time() > self.end:
            raise TemplateError(f"chat template takes more than {_MAX_SECONDS} s")

    def fits(self, length: int) -> None:
        """Refuse a text of this length, or a list of as many texts."""
        if length > self.longest:
            raise TemplateError(
                f"chat template makes a text of {length} characters, allowed {self.longest}"
            )

    def plain(self, value: Any, *, printed: bool = False) -> Any:
        """A value whose size is known to be small enough to be copied and compared."""
        if isinstance(value, (str, int, float)) or value is None:
            self.step()
            return value
        waiting, seen, length = [value], 0, 0
        while waiting:
            item = waiting.pop()
            seen += 1
            if isinstance(item, str):
                length += len(item)
            elif isinstance(item, (list, tuple)):
                waiting.extend(item)
            elif isinstance(item, Mapping):
                waiting.extend(item)
                waiting.extend(item.values())
            elif printed and isinstance(item, Namespace):  # it may hold itself, many times
                raise TemplateError("chat template prints a namespace")
            if seen + len(waiting) > _MAX_ITEMS:
                raise TemplateError(f"chat template makes a list of more than {_MAX_ITEMS} values")
        self.step(seen)
        self.fits(length)
        return value

    def each(self, values: Any) -> Any:
        """What a loop runs over: a list of known length, paid for."""
        if isinstance(values, Undefined):
            return values
        items = self.listed(values)
        self.step(len(items))
        return items

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """A list of at most as many values as are allowed."""
        limit = max(_MAX_ITEMS, self.longest if isinstance(values, str) else 0)
        items = list(islice(values, limit + 1))
        if len(items) > limit:
            raise TemplateError(f"chat template makes a list of more than {limit} values")
        return items

    def join(self, *values: Any) -> str:
        """The values as one text (`~`)."""
        return self.joined("", [self.text(value) for value in values])

    def joined(self, separator: str, texts: Sequence[str]) -> str:
        """`separator.join(texts)`."""
        self.step()
        self.fits(sum(map(len, texts)) + len(separator) * len(texts))
        return separator.join(texts)

    def replaced(self, text: str, old: str, new: str, count: int = -1) -> str:
        """`text.replace(old, new, count)`."""
        self.step()
        found = text.count(old) if count < 0 else min(count, text.count(old))
        self.fits(len(text) + found * max(0, len(new) - len(old)))
        return text.replace(old, new, count)

    def text(self, value: Any) -> str:
        """`str(value)`."""
        return value if type(value) is str else str(self.plain(value, printed=True))

    def printed(self, value: Any) -> str:
        """`str(value)`, as a part of the output."""
        self.step()
        text = self.text(value)
        self.room -= len(text)
        if self.room < 0:
            raise TemplateError(f"chat template writes more than {_MAX_TEXT} characters of its own")
        return text

    def compute(self, operator: str, left: Any, right: Any) -> None:
        """Refuse arithmetic whose result could be large."""
        self.step()
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise TemplateError(f"chat template computes with integers over {_MAX_BITS} bits")
        if operator == "+":
            self.plain(left)
            self.plain(right)
            if isinstance(left, str) and isinstance(right, str):
                self.fits(len(left) + len(right))
            return
        if operator == "*" and isinstance(left, str) and isinstance(right, int):
            self.fits(len(left) * max(0, right))
            return
        for value in (left, right):
            if not isinstance(value, (int, float)) and not isinstance(value, Undefined):
                raise TemplateError(
                    f"chat template computes {type(left).__name__} {operator} "
                    f"{type(right).__name__}; allowed between numbers only"
                )


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face runs chat templates, with only what is allowed."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are computed by the metered run, not by the compiler
            extensions=[LoopControlExtension, _Generation],
            finalize=pass_context(lambda context, value: _meter(context).printed(value)),
        )
        self.filters = {name: _metered(FILTERS[name]) for name in _ALLOWED_FILTERS}
        self.filters |= {name: globals()[f"_filter_{name}"] for name in _OWN_FILTERS}
        self.tests = {name: _metered(TESTS[name]) for name in _ALLOWED_TESTS}
        self.globals = {
            "range": _range,
            "namespace": Namespace,
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read this attribute."""
        return not attr.startswith("_") and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic, metered."""
        _meter(context).compute(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call, metered and from the list."""
        meter = _meter(context)
        meter.step()
        if isinstance(obj, Macro):
            return self._call_macro(meter, context, obj, *args, **kwargs)
        owner = getattr(obj, "__self__", None)
        if owner is meter:
            return obj(*args)
        if obj is Namespace or obj in _FUNCTIONS:
            for value in (*args, *kwargs.values()):
                meter.plain(value)
            return super().call(context, obj, *args, **kwargs)
        if isinstance(obj, Undefined):
            return super().call(context, obj, *args, **kwargs)
        name = getattr(obj, "__name__", type(obj).__name__)
        kwargs = {key: value for key, value in kwargs.items() if key not in _SCOPES}
        obj = getattr(obj, "__wrapped__", obj)  # Jinja wraps `str.format`
        owner = getattr(obj, "__self__", None)
        if isinstance(obj, BuiltinMethodType):
            for kind, names in _ALLOWED_METHODS.items():
                if isinstance(owner, kind) and name in names:
                    return _call_method(meter, owner, obj, name, args, kwargs)
        if isinstance(owner, LoopContext) and name == "cycle":
            return obj(*args)
        raise TemplateError(f"chat template calls {_printable(str(name))}, which is not allowed")

    def _call_macro(
        self, meter: Meter, context: Context, macro: Macro, /, *args: Any, **kwargs: Any
    ) -> Any:
        if meter.depth >= _MAX_DEPTH:
            raise TemplateError(f"chat template nests more than {_MAX_DEPTH} macros")
        meter.depth += 1
        try:
            return super().call(context, macro, *args, **kwargs)
        finally:
            meter.depth -= 1


class _Metering(NodeTransformer):
    """Send loops, joins, comparisons and literals through the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Loops run over lists that are paid for."""
        self.generic_visit(node)
        node.iter = _through("__each", [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~`."""
        self.generic_visit(node)
        return _through("__join", node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Comparisons, `in` included."""
        self.generic_visit(node)
        node.expr = _through("__plain", [node.expr])
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _through("__plain", [operand.expr])
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """`[a, b]`: nested ones of shared parts would print, compare or hash for ever."""
        return self._container(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """`(a, b)`, but not the targets of a loop or an assignment."""
        return self._container(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """`{a: b}`; a key is hashed before the whole is measured."""
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const):
                pair.key = _through("__plain", [self.visit(pair.key)])
        return self._container(node, [pair.value for pair in node.items])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """`text[1:]` copies; `text[1]` does not."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("__plain", [node.node])
        return node

    def _container(self, node: nodes.Expr, items: Sequence[nodes.Expr]) -> nodes.Node:
        self.generic_visit(node)
        fixed = all(isinstance(item, nodes.Const) for item in items)
        return node if fixed else _through("__plain", [node])

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        """Literal text, so that it is counted as output like any other."""
        return nodes.Const(node.data, lineno=node.lineno)


def _through(function: str, arguments: Sequence[Any]) -> nodes.Call:
    line = arguments[0].lineno
    return nodes.Call(
        nodes.Name(function, "load", lineno=line), list(arguments), [], None, None, lineno=line
    )


def _check(tree: nodes.Template) -> Iterator[str]:
    """Walk a template, refuse what is not allowed, yield its literal texts.

    Raises:
        TemplateError: naming line and construct.
    """
    waiting: list[nodes.Node] = [tree]
    seen = 0
    while waiting:
        node = waiting.pop()
        waiting.extend(node.iter_child_nodes())
        seen += 1
        if seen + len(waiting) > _MAX_NODES:
            raise TemplateError(f"chat template has more than {_MAX_NODES} parts")
        if not isinstance(node, _ALLOWED_NODES):
            _refuse(node, type(node).__name__.lower())
        if isinstance(node, nodes.For) and node.recursive:
            _refuse(node, "a recursive loop")
        if isinstance(node, (nodes.Name, nodes.NSRef, nodes.Macro, nodes.Getattr)):
            attribute = isinstance(node, nodes.Getattr)
            name = node.attr if isinstance(node, nodes.Getattr) else node.name
            if name.startswith("_" if attribute else "__") or (name == "self" and not attribute):
                _refuse(node, f"the name {name}")
        if isinstance(node, nodes.Filter) and node.name not in _ALLOWED_FILTERS + _OWN_FILTERS:
            _refuse(node, f"the filter {node.name}")
        if isinstance(node, nodes.Test) and node.name not in _ALLOWED_TESTS:
            _refuse(node, f"the test {node.name}")
        if isinstance(node, nodes.TemplateData):
            yield node.data
        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield node.value


def _refuse(node: nodes.Node, what: str) -> NoReturn:
    raise TemplateError(
        f"chat template line {node.lineno} uses {_printable(what)}, which is not allowed"
    )


def _meter(context: Context) -> Meter:
    meter: Meter = context["__meter"]
    return meter


def _metered(function: Any) -> Callable[..., Any]:
    """One of Jinja's filters or tests, its arguments measured and its result a list."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        values = [meter.listed(a) if isinstance(a, Iterator) else a for a in args]
        for value in (*values, *kwargs.values()):
            meter.plain(value)
        if wants == "context":
            values.insert(0, context)
        elif wants == "eval_context":
            values.insert(0, context.eval_ctx)
        elif wants == "environment":
            values.insert(0, context.environment)
        result = function(*values, **kwargs)
        return meter.listed(result) if isinstance(result, Iterator) else result

    return metered


def _call_method(
    meter: Meter,
    owner: Any,
    method: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    for value in (owner, *args, *kwargs.values()):
        meter.plain(value)
    if name == "join":
        return meter.joined(owner, [meter.text(value) for value in meter.listed(*args)])
    if name == "replace" and isinstance(owner, str):
        return meter.replaced(owner, *args)
    if name == "format":
        if not _PLAIN_FORMAT.fullmatch(owner):
            raise TemplateError(f"chat template formats by {_printable(repr(owner))}")
        args = tuple(meter.text(value) for value in args)
        meter.fits(len(owner) + owner.count("{") * max(map(len, args), default=0))
    return method(*args, **kwargs)


@pass_context
def _filter_indent(
    context: Context, text: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    meter = _meter(context)
    lines = meter.text(text).split("\n")
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise TemplateError(f"chat template indents by {width!r:.20}, allowed 0 to 64")
    pad = " " * width
    indented = [
        pad + line if (first or index) and (blank or line) else line
        for index, line in enumerate(lines)
    ]
    return meter.joined("\n", indented)


@pass_context
def _filter_join(
    context: Context, values: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    meter = _meter(context)
    items = meter.listed(values)
    if attribute is not None:
        items = [context.environment.getitem(item, attribute) for item in items]
    return meter.joined(meter.text(d), [meter.text(item) for item in items])


@pass_context
def _filter_replace(context: Context, text: Any, old: Any, new: Any, count: Any = -1) -> str:
    meter = _meter(context)
    return meter.replaced(
        meter.text(text), meter.text(old), meter.text(new), -1 if count is None else count
    )


@pass_context
def _filter_safe(context: Context, text: Any) -> str:
    return _meter(context).text(text)


@pass_context
def _filter_string(context: Context, value: Any) -> str:
    return _meter(context).text(value)


@pass_context
def _filter_tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    # `ensure_ascii` is not honoured: an escaped letter could not be restored by `Spans`.
    meter = _meter(context)
    meter.plain(value)
    if indent is not None and (not isinstance(indent, int) or not 0 <= indent <= 16):
        raise TemplateError(f"chat template indents JSON by {indent!r:.20}, allowed 0 to 16")
    pair = None if separators is None else (str(separators[0]), str(separators[1]))
    if pair is not None:
        meter.fits(_MAX_ITEMS * max(map(len, pair)))
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=pair, sort_keys=bool(sort_keys)
    )
    meter.fits(len(text))
    return text


def _range(*bounds: Any) -> range:
    numbers = range(*bounds)
    if len(numbers) > _MAX_ITEMS:
        raise TemplateError(f"chat template counts to {len(numbers)}, allowed {_MAX_ITEMS}")
    return numbers


def _raise_exception(message: str = "") -> NoReturn:
    raise TemplateError(f"the chat template refuses these messages: {_printable(str(message))}")


def _strftime_now(format_: object) -> str:
    if not isinstance(format_, str) or not _DATE_FORMAT.fullmatch(format_):
        raise TemplateError(f"chat template formats the date by {_printable(repr(format_))}")
    return datetime.now().strftime(format_)


_FUNCTIONS = (_range, dict, _raise_exception, _strftime_now)


def _failure(error: Exception, what: str) -> TemplateError:
    return TemplateError(f"chat template {what}: {type(error).__name__}: {_printable(str(error))}")


def _printable(text: str) -> str:
    """Text from a file, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:160])
