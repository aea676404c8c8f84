"""Chats: what messages may be, what templates may do, and what no template can do."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlite.checkpoint.chat import ChatTemplate, check_messages, disarm, harmless
from flashlite.errors import TemplateError, UsageError

CHATS = Path(__file__).parents[1] / "fixtures" / "tokens" / "chats.json"

USER = {"role": "user", "content": "Hi"}
TURNS = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "One\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo"},
    {"role": "user", "content": "Three"},
]


def render(source: str, messages: Sequence[dict[str, str]] = (USER,), prompt: bool = False) -> str:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    return template.render(list(messages), prompt)


# Messages


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        ("Hi", "messages are str, not a list"),
        ({"role": "user"}, "messages are dict, not a list"),
        (["Hi"], "message 0 is str, not an object"),
        ([USER, {"role": "root", "content": "x"}], "message 1 has the role 'root'; known are"),
        ([{"content": "x"}], "message 0 has the role 'None'"),
        ([{"role": ["user"], "content": "x"}], "message 0 has the role"),
        ([{"role": "user"}], "message 0 has content of type NoneType, not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of type list, not text"),
        ([{**USER, "name": "x"}], "message 0 has the unknown key 'name'"),
        ([USER] * 10_001, "there are 10001 messages, allowed 10000"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_messages(messages)
    assert "\n" not in str(caught.value)


def test_messages_are_copied() -> None:
    checked = check_messages([USER])
    assert checked == [USER]
    assert checked[0] is not USER


# What templates may do


def test_rendered_texts_of_the_token_fixtures(smollm2_template: ChatTemplate) -> None:
    for chat in json.loads(CHATS.read_text(encoding="utf-8")):
        messages = check_messages(chat["messages"])
        text = smollm2_template.render(messages, chat["add_generation_prompt"])
        assert text == chat["rendered"]


@pytest.fixture
def smollm2_template(smollm2_gguf: Path) -> ChatTemplate:
    from flashlite.checkpoint.open import open_checkpoint

    source = open_checkpoint(smollm2_gguf).metadata["tokenizer.chat_template"]
    assert isinstance(source, str)
    return ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ messages[0].content }}{{ messages[0]['role'] }}", "Hiuser"),
        ("{% if add_generation_prompt %}yes{% else %}no{% endif %}", "no"),
        ("{% if tools is not none %}tools{% endif %}{% if x is defined %}x{% endif %}", ""),
        # blocks leave no white space behind
        ("  {% for m in messages %}\n{{ m.content }}\n{% endfor %}\n", "Hi\n"),
        ("{%- set ns = namespace(n=0) -%}{% for i in range(3) %}{% set ns.n = ns.n + i %}"
         "{% endfor %}{{ ns.n }}", "3"),
        ("{% macro turn(m) %}[{{ m.role }}: {{ m.content | trim }}]{% endmacro %}"
         "{{ turn(messages[0]) }}", "[user: Hi]"),
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{% endfor %}",
         "0TrueTrue"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}"
         "{% endif %}{{ i }}{% endfor %}", "013"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{{ {'a': 'é<b>', 'b': [1, none]} | tojson }}", '{"a": "é<b>", "b": [1, null]}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ 'a,b'.split(',') | join('-') }}{{ 'x' ~ 1 ~ none }}", "a-bx1None"),
        ("{{ ' a '.strip() }}{{ 'abc'.replace('b', 'bb') }}{{ 'x={}'.format(3) }}", "aabbcx=3"),
        ("{{ 'abc'[1:] }}{{ [1, 2, 3][::-1] }}{{ 'ab' * 2 }}", "bc[3, 2, 1]abab"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | map(attribute='content') | join }}", "Hi"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | upper | indent(2, first=true) }}", "  A1"),
        ("{{ 7 // 2 }}{{ 7 % 2 }}{{ 1 / 2 }}{{ -1 }}{{ 2 * 3 }}", "310.5-16"),
        ("{{ 'Hi' in messages[0].content }}{{ 'a' < 'b' < 'c' }}", "TrueTrue"),
        ("{% set _x = 1 %}{{ _x }}", "1"),
        ("{{ missing }}{{ missing is defined }}{{ messages[0].name | default('none') }}",
         "Falsenone"),
    ],
)  # fmt: skip
def test_constructs_of_real_templates(source: str, text: str) -> None:
    assert render(source) == text


def test_thinking_is_cut_as_reasoning_models_do() -> None:
    source = (
        "{% for m in messages %}{% set c = m.content %}"
        "{% if m.role == 'assistant' and '</think>' in c %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ m.role }}={{ c | trim }};{% endfor %}"
    )
    assert render(source, TURNS) == "system=Be brief.;user=One;assistant=Two;user=Three;"


def test_date() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == datetime.now().strftime("%d %b %Y")


def test_a_template_may_refuse() -> None:
    source = "{{ raise_exception('roles\n must\x1b[31m alternate') }}"
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert str(caught.value) == (
        "the chat template refuses these messages: roles must [31m alternate"
    )


def test_many_long_messages_are_not_too_much() -> None:
    source = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + '\n' }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    assert len(render(source, messages)) == 1000 * (len("<|user|>\n") + 9999 + 1)


# What no template can do

PAYLOADS = {
    # reaching Python
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subscript": "{{ messages['__class__']['__mro__'] }}{{ 1/0 }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | first | upper | int + 'x' }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "percent": "{{ '%s' % messages }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ namespace.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "joiner": "{{ joiner('x')() }}",
    "self": "{{ self._TemplateReference__context }}",
    "macro internals": "{% macro m() %}{% endmacro %}{{ m._func }}",
    "loop internals": "{% for x in [1] %}{{ loop._iterator }}{% endfor %}",
    "generator frame": "{{ (messages | map('upper')).gi_frame.f_globals() }}",
    "the meter": "{{ __meter.steps }}",
    "another meter": "{% set __meter = namespace(steps=1) %}",
    "import": "{% import 'os' as os %}",
    "from import": "{% from 'os' import system %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "block": "{% block a %}{% endblock %}",
    "call block": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{% endcall %}",
    "debug": "{% debug %}",
    "changing the messages": "{{ messages.append(1) }}",
    # filling memory
    "text times": "{{ 'a' * 1000000000 }}",
    "list times": "{{ [0] * 1000000000 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "range": "{{ range(1000000000) | list }}",
    "padding": "{{ 'a'.ljust(1000000000) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "width": "{{ '{:>1000000000}'.format(1) }}",
    "date width": "{{ strftime_now('%1000000000d') }}",
    "indent": "{{ 'a\n' | indent(1000000000) }}",
    "json indent": "{{ [1] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "replace": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x.replace('', n.x) %}{% endfor %}",
    "replace filter": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x | replace('a', 'aaaaaaaa') %}{% endfor %}",
    "join": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}",
    "nested lists printed": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested lists compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "nested tuples hashed": "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}"
    "{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}",
    "nested dicts": "{% set n = namespace(x={}) %}{% for i in range(60) %}"
    "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
    "namespaces printed": "{% set n = namespace() %}{% for i in range(60) %}"
    "{% set n = namespace(a=n, b=n) %}{{ n }}{% endfor %}",
    "large integers": "{% set n = namespace(x=9) %}{% for i in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "captured output": "{% set x %}{% for i in range(9999) %}" + "y" * 5000 + "{% endfor %}"
    "{% endset %}",
    # taking time
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}"
    "{% endfor %}",
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "sorting": "{% for i in range(9999) %}{{ range(9999) | sort | length }}{% endfor %}",
    "slicing": "{% set x = 'a' * 400000 %}{% for i in range(9999) %}{% set y = x[1:] %}"
    "{% endfor %}",
    "splitting": "{% set x = 'a' * 400000 %}{% for i in range(9999) %}{% set y = x.split('a') %}"
    "{% endfor %}",
    "searching": "{% set x = 'a' * 400000 %}{% for i in range(9999) %}{% if 'b' in x %}{% endif %}"
    "{% endfor %}",
}
# These stop the compiler, which a template meets once, before it is first run.
UNCOMPILABLE = {
    "deep parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "deep operators": "{{ " + "not " * 5000 + "1 }}",
    "deep lists": "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "many parts": "{{ 1+1 }}" * 1500,
    "too long": "x" * 40_000,
    "unclosed": "{{" * 9000,
    "unclosed comment": "{#" * 9000,
}


@pytest.mark.parametrize("name", PAYLOADS | UNCOMPILABLE)
def test_payload_is_refused_in_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("os.system", lambda *args: started.append(args))
    monkeypatch.setattr("os.popen", lambda *args: started.append(args))
    gc.collect()
    gc.freeze()  # a collection would walk what the whole suite has made, and be counted here
    before = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        render((PAYLOADS | UNCOMPILABLE)[name])
    seconds = time.thread_time() - before
    gc.unfreeze()
    assert started == []
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert seconds < (0.1 if name in PAYLOADS else 0.5)
    assert render("{{ messages[0].content }}") == "Hi"  # and the next template runs


def test_output_is_bounded_by_the_messages() -> None:
    source = "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(TemplateError, match="writes more than 524288 characters of its own"):
        render(source, [{"role": "user", "content": "x" * 1000}])


# Keeping messages and scaffolding apart


def spans_of(word: str) -> Any:
    def find(text: str) -> list[tuple[int, int]]:
        starts, at = [], text.find(word)
        while at >= 0:
            starts.append((at, at + len(word)))
            at = text.find(word, at + len(word))
        return starts

    return find


@given(st.lists(st.text(st.sampled_from("<e>x\U000f0000\U000f0001 "), max_size=20), min_size=1))
def test_disarmed_spellings_come_back_where_they_were(texts: list[str]) -> None:
    find = spans_of("<e>")
    messages = [{"role": "user", "content": text} for text in texts]
    safe, spans = disarm(messages, find, "{{ '\U000f0002' }}")
    assert not any("<e>" in message["content"] for message in safe)
    restored, masked = spans.restore("|".join(message["content"] for message in safe))
    assert restored == "|".join(texts)
    assert masked == find(restored)


def test_placeholders_avoid_letters_in_use() -> None:
    messages = [{"role": "user", "content": "\U000f0000<e>"}]
    safe, _ = disarm(messages, spans_of("<e>"), "\U000f0001")
    assert safe[0]["content"] == "\U000f0000\U000f0002"


def test_messages_that_use_every_private_letter() -> None:
    text = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    messages = [{"role": "user", "content": text + "<e>"}]
    with pytest.raises(TemplateError, match="all 65534 private-use characters"):
        disarm(messages, spans_of("<e>"), "")
    with pytest.raises(TemplateError, match="all 65534 private-use characters"):
        harmless(messages, "")


def test_harmless_keeps_blank_texts() -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": " \n"}, USER]
    contents = [message["content"] for message in harmless(messages, "")]
    assert contents == ["", " \n", "\U000f0000"]
