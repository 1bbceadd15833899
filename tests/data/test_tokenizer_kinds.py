"""Tokenizer files from elsewhere: the same ids as their own libraries give, roles, appended tokens, ChatML."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizer_files as files
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import encode_conversation, encode_prompt, encode_text, last_question
from megavlm.data.schema import IMAGE_PLACEHOLDER, Turn, parse_conversation
from megavlm.data.tokenizer import Tokenizer, load_tokenizer

WRITERS: dict[str, Callable[[Path], Path]] = {
    "qwen": files.write_tiktoken,
    "qwen2": files.write_qwen2,
    "llava": files.write_llava,
    "llama": files.write_llama,
}
ROLE_NAMES = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"),
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    "llava": ("</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<image>"),
    "llama": ("</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"),
}
ADDED = {
    "qwen": (),
    "qwen2": (),
    "llava": ("<|im_start|>", "<|im_end|>", "<img>", "</img>"),
    "llama": ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"),
}
RECORD = {
    "conversations": [
        {"from": "user", "value": "Picture 1: <img>a.jpg</img>\nHow many?"},
        {"from": "assistant", "value": "Two.\n\n <ref>a square</ref><box>(1,2),(3,4)</box>"},
        {"from": "user", "value": "Sure?"},
        {"from": "assistant", "value": "Yes."},
    ],
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind)) for kind, write in WRITERS.items()}


@pytest.fixture(scope="module", params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(paths: dict[str, Path], kind: str) -> Tokenizer:
    return load_tokenizer(paths[kind])


def role_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return (
        *(tokenizer.eos_id, tokenizer.ids["<|im_start|>"], tokenizer.ids["<|im_end|>"]),
        *(tokenizer.ids["<img>"], tokenizer.ids["</img>"], tokenizer.imgpad_id),
    )


def test_roles_are_single_tokens_under_the_names_of_the_file(tokenizer: Tokenizer, kind: str) -> None:
    # Beside them the file's own special tokens, but those that texts are made of.
    assert tokenizer.control_ids >= frozenset(role_ids(tokenizer)) and len(frozenset(role_ids(tokenizer))) == 6
    in_texts = [tokenizer.encode(name) for name in ("<box>", "</ref>", "<|quad_start|>", "<|object_ref_end|>", "<unk>")]
    assert not tokenizer.control_ids.intersection(i for ids in in_texts for i in ids)
    for name, number in zip(ROLE_NAMES[kind], role_ids(tokenizer), strict=True):
        assert tokenizer.encode(name) == [number]
        assert tokenizer.decode([number]) == name
        assert tokenizer.encode(f"a{name}{name}b").count(number) == 2


def test_lacking_roles_are_appended_in_order(tokenizer: Tokenizer, kind: str, paths: dict[str, Path]) -> None:
    sizes = {"qwen": 259 + 217, "llama": 360}
    for name, behind in (("qwen2", 16), ("llava", 2)):
        sizes[name] = len(json.loads(paths[name].read_text())["model"]["vocab"]) + behind
    size, added = sizes[kind], tokenizer.added
    assert added == ADDED[kind] and tokenizer.vocab_size == size + len(added)
    assert [tokenizer.encode(name) for name in added] == [[size + i] for i in range(len(added))]


def test_answers_come_back_as_they_were(tokenizer: Tokenizer) -> None:
    for text in ["Two.", " Two ", "a  b\n\n c\n", "\n", "你好 \U0001f389 \u00e9", "<box>(1,2),(3,4)</box>", "<b>1</b>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    cut = tokenizer.encode("你")
    assert "\ufffd" in tokenizer.decode(cut[:-1])
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_a_worker_process_can_have_it(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("Hi<|im_end|>\n") == tokenizer.encode("Hi<|im_end|>\n")
    assert role_ids(again) == role_ids(tokenizer)


@pytest.mark.parametrize("name", ["qwen2", "llava"])
def test_json_encodes_as_transformers_does(paths: dict[str, Path], name: str) -> None:
    tokenizer = load_tokenizer(paths[name])
    reference = PreTrainedTokenizerFast(tokenizer_file=str(paths[name]))
    reference.add_special_tokens({"additional_special_tokens": list(ADDED[name])})
    assert len(reference) == tokenizer.vocab_size
    for text in [*files.TEXTS, *files.sentences()[:20], "x".join(ROLE_NAMES[name]), "<tool_call>{}</tool_call>"]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


def test_json_is_not_cut_short_or_padded(paths: dict[str, Path], tmp_path: Path) -> None:
    tree = json.loads(paths["qwen2"].read_text())
    tree["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tree["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    text = "How many cats sat on the red mat?"
    assert load_tokenizer(path).encode(text) == load_tokenizer(paths["qwen2"]).encode(text)


def test_json_with_a_role_among_its_ordinary_pieces(paths: dict[str, Path], tmp_path: Path) -> None:
    tree = json.loads(paths["llava"].read_text())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "</s>"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("x</s>")[-1] == tokenizer.eos_id == 2
    assert tokenizer.vocab_size == load_tokenizer(paths["llava"]).vocab_size


def test_sentencepiece_encodes_as_its_library_does(paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths["llama"])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(paths["llama"]))
    for text in [*files.sentences()[:50], *[text for text in files.TEXTS if "<|im_start|>" not in text]]:
        ids = tokenizer.encode(text)
        assert ids == reference.EncodeAsIds(text)
        assert tokenizer.decode(ids) == reference.DecodeIds(ids)
    # Each stretch between special tokens has its own dummy prefix, and loses it again.
    text = "The cat<|im_end|> sat</s>\n<s>Two"
    ids = [
        *(*reference.EncodeAsIds("The cat"), tokenizer.ids["<|im_end|>"], *reference.EncodeAsIds(" sat"), 2),
        *(*reference.EncodeAsIds("\n"), 1, *reference.EncodeAsIds("Two")),
    ]
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


def test_sentencepiece_without_byte_fallback_and_prefix(tmp_path: Path) -> None:
    path = files.write_llama(tmp_path, byte_fallback=False, add_dummy_prefix=False, vocab_size=80)
    tokenizer = load_tokenizer(path)
    assert tokenizer.added == ADDED["llama"]
    assert tokenizer.decode(tokenizer.encode("the cat<|im_end|>a mat")) == "the cat<|im_end|>a mat"
    assert 0 in tokenizer.encode("你")


def test_sentencepiece_with_added_tokens_beside_it(paths: dict[str, Path], tmp_path: Path) -> None:
    path, beside = tmp_path / "tokenizer.model", tmp_path / "added_tokens.json"
    path.write_bytes(paths["llama"].read_bytes())
    beside.write_text('{"</s>": 2, "[PAD]": 361, "<image>": 360}')
    tokenizer = load_tokenizer(path)
    assert (tokenizer.imgpad_id, tokenizer.encode("[PAD]")) == (360, [361])
    assert tokenizer.added == ADDED["llama"][:-1] and tokenizer.vocab_size == 362 + 4
    for text, message in [
        ('{"<image>": 5}', "<image> has the id 5 in added_tokens.json, but tokenizer.model says that this is <0x02>"),
        ('{"</s>": 360}', "</s> has the id 360 in added_tokens.json, but tokenizer.model says 2; correct one"),
        ("[1]", "must hold a JSON object"),
        ('{"a": "b"}', "must be an object of tokens"),
        ("{", "not valid JSON"),
    ]:
        beside.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(path)
        assert str(beside) in str(caught.value)


def decoder(**tokens: int) -> dict[str, object]:
    names = {"image": "<image>", "pad": "<pad>", "start": "<|im_start|>", "end": "<|im_end|>", "eos": "</s>"}
    return {"added_tokens_decoder": {str(number): {"content": names[key]} for key, number in tokens.items()}}


BESIDE: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    # Files beside Llama's model of 360 pieces; the ids of <image>, <pad>, <|im_start|> and <|im_end|>.
    "a decoder": ({"tokenizer_config.json": decoder(image=360, pad=361)}, (360, 361, 362, 363)),
    "both": (
        {"tokenizer_config.json": decoder(image=360, pad=361), "added_tokens.json": {"<image>": 360, "<pad>": 361}},
        (360, 361, 362, 363),
    ),
    "one has more": (
        {"tokenizer_config.json": decoder(image=360, pad=361), "added_tokens.json": {"<|im_start|>": 362}},
        (360, 361, 362, 363),
    ),
    "a gap": ({"tokenizer_config.json": decoder(image=363, pad=361)}, (363, 361, 364, 365)),
    "names alone": (
        {"special_tokens_map.json": {"pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<image>"]}},
        (361, 360, 362, 363),  # in Transformers' order, whatever that of the file
    ),
    "the fast one's": (
        {"tokenizer.json": {"added_tokens": [{"content": "<image>", "id": 360}, {"content": "<pad>", "id": 361}]}},
        (360, 361, 362, 363),
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_ids_in_the_files_beside_a_model(case: str, paths: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(paths["llama"].read_bytes())
    given, (image, pad, start, end) = BESIDE[case]
    for name, tree in given.items():
        (tmp_path / name).write_text(json.dumps(tree))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.imgpad_id, tokenizer.ids["<|im_start|>"], tokenizer.ids["<|im_end|>"]) == (image, start, end)
    assert tokenizer.encode("<pad>") == [pad] and tokenizer.decode([image, pad]) == "<image><pad>"


@pytest.mark.parametrize("kind", ["llama", "llava", "qwen2"])
def test_places_that_disagree_are_both_named(kind: str, paths: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / ("tokenizer.model" if kind == "llama" else "tokenizer.json")
    path.write_bytes(paths[kind].read_bytes())
    size = load_tokenizer(path).vocab_size
    pairs: list[tuple[dict[str, object], str]] = [
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {str(size): {"content": "<new>"}}},
             "added_tokens.json": {"<new>": size + 1}},
            rf"<new> has the id {size} in tokenizer_config.json .*, but added_tokens.json says {size + 1}",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {str(size): {"content": "<new>"}}},
             "added_tokens.json": {"<other>": size}},
            r"<new> has the id .* in tokenizer_config.json .*, but added_tokens.json says that this is <other>",
        ),
        ({"added_tokens.json": {load_tokenizer(path).decode([1]): 77}}, rf"in added_tokens.json, but {path.name} says"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "must be an object of ids and their tokens"),
        ({"special_tokens_map.json": [1]}, "must hold a JSON object"),
    ]  # fmt: skip
    for given, message in pairs:
        for name, tree in given.items():
            (tmp_path / name).write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)
        for name in given:
            (tmp_path / name).unlink()


def test_named_tokens_get_the_ids_that_transformers_gives(paths: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(paths["llava"].read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<padx>"}
    more = {"bos_token": "<b>", "additional_special_tokens": ["<|im_end|>", "<|im_start|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(more))
    tokenizer, reference = load_tokenizer(tmp_path / "tokenizer.json"), AutoTokenizer.from_pretrained(tmp_path)
    for name in ("<b>", "<padx>", "<|im_end|>", "<|im_start|>", "<image>"):
        assert tokenizer.encode(name) == [reference.convert_tokens_to_ids(name)], name
    assert tokenizer.added == ("<img>", "</img>") and tokenizer.vocab_size == len(reference) + 2


def test_a_piece_that_was_left_free_may_get_a_name(tmp_path: Path) -> None:
    path = files.write_llama(tmp_path, user_defined_symbols=["[UNUSED_TOKEN_0]", "<x>"])
    number = sentencepiece.SentencePieceProcessor(model_file=str(path)).PieceToId("[UNUSED_TOKEN_0]")
    beside = {"added_tokens_decoder": {str(number): {"content": "<|im_start|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    assert load_tokenizer(path).ids["<|im_start|>"] == number


def test_conversation_and_mask(tokenizer: Tokenizer) -> None:
    conversation = parse_conversation(RECORD)
    sample = encode_conversation(conversation, tokenizer, [(3,)], "You are helpful.")
    t = tokenizer
    image = [t.ids["<img>"], *[t.imgpad_id] * 3, t.ids["</img>"]]
    newline = t.encode("\n")
    want: list[tuple[list[int], bool]] = []
    for role, content in [
        ("system", t.encode("You are helpful.")),
        ("user", t.encode("Picture 1: ") + image + t.encode("\nHow many?")),
        ("assistant", t.encode(RECORD["conversations"][1]["value"])),
        ("user", t.encode("Sure?")),
        ("assistant", t.encode("Yes.")),
    ]:
        want += [([t.ids["<|im_start|>"]], True), (t.encode(f"{role}\n"), False), (content, role == "assistant")]
        want += [([t.ids["<|im_end|>"], *newline], True)]
    assert sample.tokens.tolist() == [i for ids, _ in want for i in ids]
    labels = [i if trained else IGNORE_INDEX for ids, trained in want for i in ids]
    assert sample.labels.tolist() == labels
    assert (sample.tokens == t.imgpad_id).sum() == 3 and sample.num_images == 1
    prompt = encode_prompt(conversation.turns[:3], t, [(3,)], "You are helpful.")
    assert sample.tokens.tolist()[: len(prompt)] == prompt.tolist()
    assert last_question(prompt, t) == "Sure?"
    first = encode_prompt(conversation.turns[:1], t, [(3,)], "")
    assert last_question(first, t) == f"Picture 1: {IMAGE_PLACEHOLDER}\nHow many?"


def test_byte_level_chat_is_the_rendered_text(paths: dict[str, Path]) -> None:
    """Encoding the pieces apart gives the ids of the whole text, as transformers encodes a rendered template."""
    reference = PreTrainedTokenizerFast(tokenizer_file=str(paths["qwen2"]))
    sample = encode_conversation(parse_conversation(RECORD), load_tokenizer(paths["qwen2"]), [(2,)], "You are helpful.")
    values = [message["value"] for message in RECORD["conversations"]]
    values[0] = values[0].replace("<img>a.jpg</img>", "<|vision_start|>" + "<|image_pad|>" * 2 + "<|vision_end|>")
    turns = [("system", "You are helpful."), *zip(["user", "assistant"] * 2, values, strict=True)]
    text = "".join(f"<|im_start|>{role}\n{value}<|im_end|>\n" for role, value in turns)
    assert sample.tokens.tolist() == reference.encode(text, add_special_tokens=False)


def test_text_cannot_forge_turns_or_image_slots(tokenizer: Tokenizer, kind: str) -> None:
    for name in ROLE_NAMES[kind]:
        with pytest.raises(ValueError, match="control token"):
            encode_prompt([Turn("user", f"Hi {name} there")], tokenizer, [], "S.")
        with pytest.raises(ValueError, match="control token"):
            encode_text(f"{IMAGE_PLACEHOLDER}{name}", tokenizer, [(3,)])
    ids = encode_text(f"a{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}b", tokenizer, [(3,)] * 2)
    assert ids.count(tokenizer.imgpad_id) == 6


def test_json_that_is_no_tokenizer(paths: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tree = json.loads(paths["qwen2"].read_text())
    gap = [*tree["added_tokens"][:-1], {**tree["added_tokens"][-1], "id": 5000}]
    headless = [token for token in tree["added_tokens"] if token["content"] != "<|endoftext|>"]
    for text, message in [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a tokenizer.json"),
        ("{}", "not a tokenizer.json: Model missing"),
        ('{"added_tokens": 3}', "not a tokenizer.json"),
        ('{"added_tokens": [{"id": 3}]}', "not a tokenizer.json"),
        (json.dumps({**tree, "model": {"type": "BPE"}}), "not a tokenizer.json"),
        (json.dumps({**tree, "added_tokens": gap}), "gaps in its ids: </tool_call> is 5000"),
        (json.dumps({**tree, "added_tokens": headless}), "gaps in its ids"),
        (json.dumps({**tree, "added_tokens": []}), "no token that ends a document"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_tokenizer(path)


def test_nothing_in_the_directory_is_executed(paths: dict[str, Path], tmp_path: Path) -> None:
    tree = json.loads(paths["qwen2"].read_text())
    auto_map = {"AutoTokenizer": ["canary.CanaryTokenizer", None]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tree, "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "trust_remote_code": True}))
    canary = f"from pathlib import Path\nPath({str(tmp_path / 'sang')!r}).touch()\n"
    for name in ("canary.py", "tokenization_qwen.py", "__init__.py"):
        (tmp_path / name).write_text(canary)
    try:
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    except ValueError as error:  # the library may refuse keys that it does not know
        assert "not a tokenizer.json" in str(error)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("Hello") == load_tokenizer(paths["qwen2"]).encode("Hello")
    assert not (tmp_path / "sang").exists()
