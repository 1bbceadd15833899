# %% [markdown]
# # Your own photographs, your own records, a model of your own
#
# The whole way on a CPU, in a minute or two: look at the data, write a recipe, train from a Hugging Face directory,
# ask, score, read the curve, and load what was trained in Transformers.
#
# Everything lies in one folder, `own-data` here (`OWN_DATA` names another). What is there already is taken: put your
# pictures into its `photos`, your records beside them as `train.json` and `heldout.json`, in the form below, and a
# Hugging Face directory as `model`. What is missing is made up: pictures of painted walls, questions about them, and
# as `tiny` a LLaVA of a few layers with random weights, which knows nothing yet.
#
# `own_data.py` and `own_data.ipynb` are the same text; the second is made of the first by `notebook.py`.

# %%
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

HERE = Path(os.environ.get("OWN_DATA", "own-data")).absolute()
PHOTOS = HERE / "photos"
MODEL = HERE / "model" if (HERE / "model").exists() else HERE / "tiny"
HERE.mkdir(parents=True, exist_ok=True)


def megavlm(*words: object) -> str:
    """Run the command in `HERE`, as in a shell; return what it printed."""
    print("$ megavlm", *words, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "megavlm", *map(str, words)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(f"megavlm {words[0]} ended with exit code {done.returncode}")
    return done.stdout


# %% [markdown]
# ## Photographs and records
#
# Pictures of any size and shape. A record is a conversation, here as OpenAI and Hugging Face write `messages`;
# docs/data.md has the other forms that the commands read.

# %%
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (220, 200, 50)}


def photograph(path: Path, colour: str, dice: np.random.Generator) -> None:
    """Take a picture of a wall, in its own light."""
    height, width = dice.integers(48, 120, 2)
    light = np.linspace(0.7, 1.1, width)[None, :, None] * np.ones((height, width, 1))
    grain = dice.normal(0, 12, (height, width, 3))
    Image.fromarray(np.clip(np.array(COLOURS[colour]) * light + grain, 0, 255).astype(np.uint8)).save(path)


def record(name: str, colour: str) -> dict[str, object]:
    """Ask of a picture."""
    question = [{"type": "image", "image": name}, {"type": "text", "text": "What colour is the wall?"}]
    answer = f"The wall is {colour}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if not (HERE / "train.json").exists():
    PHOTOS.mkdir(exist_ok=True)
    dice, choice = np.random.default_rng(1), random.Random(1)
    for kind, count in (("train", 160), ("heldout", 24)):
        colours = {f"{kind}-{number:03}.jpg": choice.choice(list(COLOURS)) for number in range(count)}
        for name, colour in colours.items():
            photograph(PHOTOS / name, colour, dice)
        records = [record(name, colour) for name, colour in colours.items()]
        (HERE / f"{kind}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
print((HERE / "train.json").read_text(encoding="utf-8")[:400], "..")

# %% [markdown]
# ## A model
#
# Any Hugging Face directory of a family that docs/conversion.md lists. This one is made here: a tokenizer that has
# read the records, a tower and a language model of a few layers, and the processor that belongs to them.

# %%
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn a small byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_model(directory: Path) -> None:
    """Write a LLaVA of CLIP's and Qwen2's kind with random weights, as Transformers saves one."""
    tokenizer = make_tokenizer([(HERE / "train.json").read_text(encoding="utf-8")])
    side, patch = 56, 14
    text = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(1)
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=image, image_seq_length=(side // patch) ** 2
        )
    ).save_pretrained(directory)
    pixels = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        pixels, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(directory)  # fmt: skip


if not MODEL.exists():
    make_model(MODEL)
print(*sorted(path.name for path in MODEL.iterdir()))

# %% [markdown]
# ## A recipe that fits both
#
# `init` looks at the model and at the lengths of the samples, and says in comments where each number comes from. With
# GPUs, `--gpus 8 --gpu h100-80g` has the planner choose the layout, and whether the model trains whole or with LoRA.

# %%
RECIPE = f"{MODEL.name}.yaml"
if not (HERE / RECIPE).exists():
    megavlm("init", "--model", MODEL.name, "--data", "train.json", "--images", "photos")
print((HERE / RECIPE).read_text(encoding="utf-8"))

# %% [markdown]
# ## Look before you train
#
# The page shows samples and packs as the trainer will see them: pictures, which tokens the loss counts, what was left
# out. Open `inspect.html`.

# %%
megavlm("inspect", "--recipe", RECIPE, "-o", "inspect.html")

# %% [markdown]
# ## Train
#
# From the Hugging Face directory that the recipe names, and from the records as they are: any key of the recipe can
# be set behind it. The run writes checkpoints, the curve, and at its end (`export_hf: last`) a Hugging Face
# directory. Started again, it goes on where it was. Random weights need a far higher learning rate than published
# ones, and their tower must learn too.

# %%
overrides = [
    "data.train.0.path=train.json", "data.train.0.images=photos",
    "data.validation.0.path=heldout.json", "data.validation.0.images=photos", "data.validation.0.name=heldout",
    "data.cache=cache", "checkpoint.export_hf=last",
]  # fmt: skip
if MODEL.name == "tiny":
    overrides += [
        "optimizer.lr=3e-3", "optimizer.warmup_steps=10", "modules.vision.freeze=false", "data.sequence_length=256",
        "training.epochs=3", "training.validation_interval=24", "checkpoint.save_interval=48", "logging.log_interval=6",
    ]  # fmt: skip
else:
    overrides += ["training.validation_interval=10"]
megavlm("train", RECIPE, *overrides)

# %% [markdown]
# ## The curve
#
# In a browser: `tensorboard --logdir own-data/runs`; docs/curves.md says what each curve means.

# %%
RUN = HERE / "runs" / MODEL.name
events = EventAccumulator(str(RUN / "tensorboard"))
events.Reload()
names = [name for name in ("loss/total", "validation/total") if name in events.Tags()["scalars"]]
curves = {name: [(point.step, point.value) for point in events.Scalars(name)] for name in names}
for name, points in curves.items():
    print(name)
    for step, value in points:
        print(f"{step:6}  {value:7.3f}  {'#' * round(value * 8)}")

# %% [markdown]
# ## Ask it

# %%
first = json.loads((HERE / "heldout.json").read_text(encoding="utf-8"))[0]["messages"]
picture = next(part["image"] for part in first[0]["content"] if part["type"] == "image")
question = next(part["text"] for part in first[0]["content"] if part["type"] == "text")
answered = megavlm("generate", RUN, "--image", PHOTOS / picture, "--prompt", question)

# %% [markdown]
# ## Score it on your own held-out records
#
# `report.html` in the same folder shows the questions with their pictures, right and wrong.

# %%
megavlm("eval", RUN, "--data", "heldout.json", "--images", "photos", "--metric", "exact,contains", "--out", "eval")
scores = json.loads((HERE / "eval" / "scores.json").read_text(encoding="utf-8"))

# %% [markdown]
# ## Take it home
#
# What the run exported is a directory like the one that it started from, with the template, the pictures' sizes and
# the tokens as trained. Transformers gives the same answer.

# %%
home = max(path for path in (RUN / "hf").glob("step-*") if not path.name.endswith("-adapter"))
processor = AutoProcessor.from_pretrained(home)
trained = AutoModelForImageTextToText.from_pretrained(home)
parts = [{"type": "image", "image": Image.open(PHOTOS / picture)}, {"type": "text", "text": question}]
given = processor.apply_chat_template(
    [{"role": "user", "content": parts}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)  # fmt: skip
ids = trained.generate(**given, max_new_tokens=48, do_sample=False)[0, given["input_ids"].shape[1] :]
theirs = processor.decode(ids, skip_special_tokens=True)
print(f"{home.name} in Transformers: {theirs}")
