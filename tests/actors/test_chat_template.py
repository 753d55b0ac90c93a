"""Chat templates against transformers' rendering, and what they may not do."""

import json
from pathlib import Path
from typing import Any

import pytest

from polymux.actors.chat_template import ChatTemplate, load_templates
from polymux.transport.errors import CheckpointError, InvalidRequest

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "models"
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <b>kind</b>."},
    {"role": "user", "content": "  Héllo 你好 \n", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<é>", "y": [1, 2.5, None]}}}]},
    {"role": "user", "content": "And?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "whitespace": (
        "{{ bos_token }}\n  {% for message in messages %}\n    {%- if loop.first %}\n FIRST {% endif %}\n"
        "  [{{ message['role'] | trim }}] {{ (message['content'] or 'none') | trim }}{{ eos_token }}\n  {% endfor %}\n end"
    ),
    "tools": (
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for message in messages %}{{ message | tojson }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson(sort_keys=true) }}{% endfor %}{% endfor %}"
    ),
    "loops": (
        "{% set ns = namespace(n=0) %}{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ message.role }}{% if ns.n == 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation": (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{% generation %}{% set x = 1 %}{{ message.role }}!{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}{{ x is defined }}"
    ),
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ mask_token }}{{ documents }}{{ messages | length }}{{ add_generation_prompt }}",
    "date": "{{ strftime_now('%Y') | length }}{{ dict(a=1)['a'] }}{{ messages[-1].content.split('n')[0] }}",
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "llama-small")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_a_rendering_is_that_of_transformers(theirs: Any, name: str, generation: bool, tools: Any) -> None:
    expected = theirs.apply_chat_template(
        TURNS, tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=generation, tokenize=False
    )
    ours = ChatTemplate({"default": TEMPLATES[name]}, theirs.special_tokens_map, "test")
    assert ours.render(TURNS, tools=tools, add_generation_prompt=generation) == expected


def test_variables_reach_the_template_and_may_replace_special_tokens() -> None:
    ours = ChatTemplate({"default": "{{ bos_token }}{{ enable_thinking }}"}, {"bos_token": "<s>"}, "test")
    assert ours.render(TURNS, variables={"enable_thinking": False, "bos_token": "^"}) == "^False"


def test_requests_with_tools_use_the_template_made_for_them() -> None:
    ours = ChatTemplate({"default": "plain", "tool_use": "tools"}, {}, "test")
    assert ours.render(TURNS) == "plain"
    assert ours.render(TURNS, tools=TOOLS) == "tools"


def test_parts_reach_a_template_that_reads_them_and_are_joined_for_others() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    reads = "{% for p in messages[0].content %}{{ p if p is string else '<' + p.text + '>' }}{% endfor %}"
    reads_both = (
        "{% set content = messages[0].content %}"
        "{% if content is string %}{{ content }}{% else %}{% for p in content %}{{ p.text }}{% endfor %}{% endif %}"
    )
    assert ChatTemplate({"default": reads_both}, {}, "test").render(parts) == "ab"
    assert ChatTemplate({"default": reads}, {}, "test").render(parts) == "a\nb"
    assert ChatTemplate({"default": "{{ messages[0].content }}"}, {}, "test").render(parts) == "a\nb"


# -- where templates are found ----------------------------------------------------------------------------------------


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    assert load_templates(tmp_path) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert load_templates(tmp_path) == {}
    config.write_text(json.dumps({"chat_template": "one"}))
    assert load_templates(tmp_path) == {"default": "one"}
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}))
    assert load_templates(tmp_path) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_templates(tmp_path) == {"default": "file"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert load_templates(tmp_path) == {"default": "file", "tool_use": "more"}


@pytest.mark.parametrize("declared", [3, {"default": "x"}, [], ["x"], [{"name": "default"}], [{"name": "default", "template": 3}]])
def test_a_template_of_the_wrong_kind_is_refused(tmp_path: Path, declared: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": declared}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: `chat_template`"):
        load_templates(tmp_path)


def test_a_template_that_does_not_compile_is_refused_by_line() -> None:
    with pytest.raises(CheckpointError, match=r"model x: chat template default, line 2"):
        ChatTemplate({"default": "fine\n{% for %}"}, {}, "model x")


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ 1 + messages[0].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_what_a_template_cannot_or_may_not_do_is_an_error_of_messages(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate({"default": template}, {}, "test").render(TURNS)
    assert caught.value.param == "messages"


def test_a_templates_own_words_reach_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {}, "test").render(TURNS)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "user", "content": "x"}, "y"], "messages[1]"),
        ([{"role": 3, "content": "x"}], "messages[0]"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}], "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0]"),
    ],
)
def test_messages_of_the_wrong_kind_are_refused_by_place(messages: Any, place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate({"default": TEMPLATES["chatml"]}, {}, "test").render(messages)
    assert caught.value.message.startswith(f"{place}: ")
    assert caught.value.param == "messages"


def test_a_model_without_a_template_says_where_prompts_go() -> None:
    with pytest.raises(InvalidRequest, match="no chat template; send a prompt to /v1/completions"):
        ChatTemplate({}, {}, "test").render(TURNS)
