"""A chat template's Jinja text, rendered as Transformers renders it, but bounded: a checkpoint's text is not trusted.

The sandbox is the one that Transformers uses (``ImmutableSandboxedEnvironment``), so that no text reaches Python. On
top of it, loops and calls are counted, and what would become a value of more than a million characters is refused
before it is made. The bounds are far above what a conversation takes.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megavlm.data.template import TemplateError

START, STOP = "\0generation\0", "\0endgeneration\0"
"""In a rendered text, around what stood between ``{% generation %}`` and ``{% endgeneration %}``."""

_MOST_CHARACTERS = 1 << 20
_MOST_TEXT = 1 << 20  # of the template itself
_MOST_STEPS = 100_000
_MOST_SECONDS = 10.0
_MOST_WIDTH = 1 << 16
_LONG_WIDTH = re.compile(r"\d{5,}|\*")


class _Generation(Extension):
    """The block that Transformers puts around what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Parse the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _marked(self, context: Any, caller: Any) -> str:
        return START + caller() + STOP


class _TemplateDict:
    """``dict``, of which nothing else can be reached."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _TemplateNamespace(Namespace):
    """``namespace``, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        Namespace.__setitem__(self, name, value)


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox that counts what is done, and weighs what is made."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters = {name: self._bounded(name, call) for name, call in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),  # as Transformers has it
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
        }
        self.finalize = _printable
        self.steps, self.until = 0, 0.0

    def begin(self) -> None:
        """Begin counting anew."""
        self.steps, self.until = 0, time.monotonic() + _MOST_SECONDS

    def tick(self) -> str:
        """Count a step of a loop, or a call.

        Raises:
            SecurityError: there are too many.
        """
        self.steps += 1
        if self.steps > _MOST_STEPS or time.monotonic() > self.until:
            raise SecurityError("it does not come to an end")
        return ""

    def concat_values(self, *values: Any) -> str:
        """Return what ``~`` makes."""
        _weigh(values)
        return "".join(map(str, values))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        blocks: list[Any] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
        for node in blocks:
            step = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        _replace_concatenations(tree)
        tree.set_environment(self)
        return tree

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse an attribute at once; Jinja's own sandbox writes nothing where it is only printed."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute after a look at how large it becomes."""
        if operator == "**" and not (_number(left) and _number(right) and abs(left) < 1e6 and abs(right) <= 16):
            raise SecurityError("a power is too large")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | Sequence) and _number(other) and _weigh(one) * other > _MOST_CHARACTERS:
                    raise SecurityError("a repeated text is too large")
            if _number(left) and _number(right) and max(abs(left), abs(right)) > 1e15:
                raise SecurityError("a product is too large")
        if operator == "%" and isinstance(left, str) and _LONG_WIDTH.search(left):
            raise SecurityError("a text is padded too far")
        made = super().call_binop(context, operator, left, right)
        _weigh(made)
        return made

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what is safe, with arguments of bearable size."""
        self.tick()
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # format is wrapped
        _check_call(owner, getattr(function, "__name__", ""), [*args, *kwargs.values()])
        made = super().call(context, function, *args, **kwargs)
        _weigh(made)
        return made

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passed = getattr(function, "jinja_pass_arg", None)

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            own = list(args[1:] if passed is not None else args)
            _check_call(own[0] if own else None, name, [*own[1:], *kwargs.values()])
            made = function(*args, **kwargs)
            return made if isinstance(made, Iterator) else _kept(made)

        return bounded


def render(text: str, values: Mapping[str, Any], where: str) -> str:
    """Return what a template makes of values.

    Args:
        text: the template.
        values: names and plain values that it sees.
        where: what it is called in messages.

    Raises:
        TemplateError: it has a syntax error, refuses the values, does not end, grows without bounds, or reaches for
            what the sandbox does not give.
    """
    template = compiled(text, where)
    environment = template.environment
    environment.begin()
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate(**values):
            size += len(part)
            if size > _MOST_CHARACTERS:
                raise SecurityError("its text is too large")
            parts.append(part)
    except SecurityError as error:
        raise TemplateError(f"{where}: the chat template is refused: {error}") from None
    except JinjaError as error:
        raise TemplateError(f"{where}: the chat template refuses the conversation: {error}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        raise TemplateError(
            f"{where}: the chat template fails on the conversation: {type(error).__name__}: {str(error)[:200]}"
        ) from None
    made = "".join(parts)
    if not made.isascii():
        try:
            made.encode("utf-8")
        except UnicodeEncodeError:  # an escape such as \ud800 in one of its texts
            raise TemplateError(f"{where}: the chat template writes half a surrogate pair, which is no text") from None
    return made


@functools.lru_cache(maxsize=16)
def _compile(text: str) -> Any:
    environment = _Bounded()
    return environment.from_string(text)


def compiled(text: str, where: str) -> Any:
    """Return a template that :func:`render` runs.

    Raises:
        TemplateError: it has a syntax error, or is too large.
    """
    if len(text) > _MOST_TEXT:
        raise TemplateError(f"{where}: the chat template has {len(text):,} characters; it is damaged")
    try:
        return _compile(text)
    except JinjaError as error:
        line = getattr(error, "lineno", None)
        at = f", line {line}" if line else ""
        raise TemplateError(f"{where}: the chat template has a syntax error{at}: {error}") from None
    except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:  # of what Jinja makes of it
        raise TemplateError(f"{where}: the chat template cannot be compiled: {type(error).__name__}") from None


def _raise(message: str) -> None:
    raise JinjaError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as Transformers' filter writes it: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _printable(value: Any) -> Any:
    _weigh(value)
    return value


def _kept(value: Any) -> Any:
    _weigh(value)
    return value


def _check_call(owner: Any, name: str, args: Sequence[Any]) -> None:
    """Refuse a call whose result would be too large.

    Raises:
        SecurityError: it would.
    """
    size = _weigh(owner) if isinstance(owner, str | list | tuple | dict) else 1
    for one in args:
        if isinstance(one, int) and abs(one) > _MOST_WIDTH and name != "range":
            raise SecurityError(f"a number is too large for {name}")
    texts = [one for one in args if isinstance(one, str)]
    if name == "replace" and len(texts) > 1 and isinstance(owner, str):
        count = owner.count(texts[0]) if texts[0] else len(owner) + 1
        size += count * len(texts[1])
    elif name == "join":
        parts = owner if isinstance(owner, list | tuple) else next((a for a in args if isinstance(a, list | tuple)), ())
        glue = owner if isinstance(owner, str) else next(iter(texts), "")
        size += len(parts) * len(glue) + sum(_weigh(one) for one in args)
    elif name in ("indent", "wordwrap") and isinstance(owner, str):
        width = max([1, *(len(one) for one in texts), *(one for one in args if isinstance(one, int))])
        size += owner.count("\n") * width
    elif name in ("format", "format_map") and isinstance(owner, str) and _LONG_WIDTH.search(owner):
        raise SecurityError("a text is padded too far")
    else:
        size += sum(_weigh(one) for one in args)
    if size > _MOST_CHARACTERS:
        raise SecurityError(f"what {name} makes is too large")


def _weigh(value: Any) -> int:
    """Return the characters and members of a value, each as often as it would be written.

    Raises:
        SecurityError: there are too many.
    """
    size, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, int) and not isinstance(one, bool) and one.bit_length() > 4096:
            raise SecurityError("a number is too large")
        elif isinstance(one, Mapping):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            rest += one
        size += 1
        if size > _MOST_CHARACTERS:
            raise SecurityError("a value is too large")
    return size


def _replace_concatenations(node: nodes.Node) -> None:
    """Let ``~`` go through the environment, which weighs what it makes."""
    for name, value in list(node.iter_fields()):
        many = value if isinstance(value, list) else [value]
        for index, child in enumerate(many):
            if not isinstance(child, nodes.Node):
                continue
            _replace_concatenations(child)
            if isinstance(child, nodes.Concat):
                function = nodes.EnvironmentAttribute("concat_values")
                call = nodes.Call(function, list(child.nodes), [], None, None).set_lineno(child.lineno)
                if isinstance(value, list):
                    value[index] = call
                else:
                    setattr(node, name, call)
