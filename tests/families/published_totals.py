"""Where the number of a published model's parameters was read, beside the count of its class.

Found in a store of public repositories, by the number itself or by twice that (bytes in bf16, ``total_size`` of
``model.safetensors.index.json``); the store gives some files a number and no repository. A preset that is not here is
**unchecked**: its total in ``whole_rows.py`` is the class's own, and rounded as its page has it from memory.
"""

from __future__ import annotations

_HUB = "floschne/gimmick, src/gimmick/models/__init__.py @ 81c06a5e: by HfApi.get_safetensors_metadata"
_MTEB = "embeddings-benchmark/mteb, mteb/models/model_implementations/"


def _tuned(file: str, model: str) -> str:
    """Return the source of a total that is that of a model which was trained from the published one."""
    return f"{_MTEB}{file}: n_parameters of {model}, trained from it"


def _file(number: int, words: str) -> str:
    return f"file {number} of the store: {words}"


SOURCES: dict[str, str] = {
    "llava_1_5_7b": _file(53760140093, "the parameters of llava-hf/llava-1.5-7b-hf, loaded"),
    "llava_1_6_mistral_7b": _tuned("bge_vl_models.py @ 96184d2e", "BAAI/BGE-VL-v1.5-zs"),
    "llava_next_llama3_8b": _tuned("e5_v.py @ 05662e7f", "royokong/e5-v"),
    "llava_onevision_7b": _file(59775994272, "mteb's n_parameters of TianchengGu/UniME-V2-LLaVA-OneVision-8B"),
    "internvl2_5_1b": _HUB,
    "internvl2_5_4b": _HUB,
    "internvl2_5_38b": _HUB,
    "internvl2_5_78b": _HUB,
    # Of one shape with those of InternVL2.5, which a test holds.
    "internvl3_1b": _HUB,
    "internvl3_38b": _HUB,
    "internvl3_78b": _HUB,
    "internvl3_2b": _file(69312082340, "counted from the header of model.safetensors"),
    "internvl3_8b": _file(70450163794, "counted from the headers of a SenseNova model that was trained from it"),
    "internvl3_5_1b": _file(55751370573, "OpenGVLab/InternVL3_5-1B-HF @ 9191dbcc"),
    "internvl3_5_8b": _file(69070546325, "the hub's figures of OpenGVLab/InternVL3_5-8B-HF"),
    "qwen_vl_7b": _file(34418076974, "total_params of Qwen-VL in a table of models"),
    "qwen2_vl_2b": _HUB,
    "qwen2_vl_7b": f"{_HUB}; file 67057424930 of the store: total_size 16582751232",
    "qwen2_vl_72b": _HUB,
    "qwen2_5_vl_3b": _tuned("gve_models.py @ edeffb25", "Alibaba-NLP/GVE-3B"),
    "qwen2_5_vl_7b": f"{_tuned('gve_models.py @ edeffb25', 'Alibaba-NLP/GVE-7B')}; total_size 16584333312",
    "qwen2_5_vl_32b": _file(62225960460, "parameters and bytes of the 32B"),
    "qwen3_vl_2b": _file(71051069615, "625 tensors of 4255064064 bytes"),
    "qwen3_vl_4b": _file(57479162165, "713 tensors, 8875631616 bytes by the headers of the shards @ ebb281ec"),
    "qwen3_vl_8b": _file(62872967919, "the hub's figures of Qwen/Qwen3-VL-8B-Instruct @ 0c351dd0"),
    "qwen3_vl_32b": _file(57372990599, "total_size 66714780128 @ 939557dc"),
    "qwen3_vl_30b_a3b": _file(66729435508, "paramCount of Qwen 3 VL 30B A3B Instruct, in a server's list of models"),
    "qwen3_vl_235b_a22b": _file(66729435508, "paramCount of Qwen 3 VL 235B A22B, in the same list"),
    "smolvlm_256m": _file(71138913262, "the hub's figures of HuggingFaceTB/SmolVLM-256M-Instruct"),
    "smolvlm_500m": _file(71138913262, "the hub's figures of HuggingFaceTB/SmolVLM-500M-Instruct"),
    "smolvlm_2_2b": "huggingface/smollm, finetuning/Smol_VLM_FT.ipynb @ c26df8c6: 2256809840 with 10536960 of adapters",
    "paligemma_3b_224": _file(57444468301, "the parameters of PaliGemma, loaded, in a table of compressed models"),
    # Keras counts the vocabulary without the 64 rows of 2048 that Transformers' files pad it with.
    "paligemma_3b_448": _file(29273983739, "keras_hub's 2924220144, and 131072 of the padding"),
    "paligemma_3b_896": _file(29273983739, "keras_hub's 2927759088, and 131072 of the padding"),
    "llama3_2_vision_11b": _file(12439498600, "the parameters of meta-llama/Llama-3.2-11B-Vision-Instruct, in a table"),
    "gemma3_4b": _file(70911651117, "the parameters of unsloth's copy, in a table of models"),
    "gemma3_12b": _file(59172823075, "the hub's figures of google/gemma-3-12b-it"),
    "gemma3_27b": _file(3173084990, "keras_hub's parameters of medgemma_instruct_27b, trained from it"),
    # 15241808 of the tower's last layer and the norm behind it, and 15238352 of its head, are not built here.
    "tinyllava_3_1b": _file(53836899074, "3217417280 parameters of TinyLLaVA-Phi-2-SigLIP-3.1B, loaded"),
    # model.safetensors.index.json of copies of the published repositories.
    "minicpm_v_2": "HwwwwwwwH/MiniCPM-V-2 @ 84ce9b0: total_size 6869931584 in bf16, 694 tensors",
    "minicpm_llama3_v_2_5": "theonlyengine/VQA_Model @ 4520826: total_size 34148369344 in fp32, 741 tensors",
    # Without the 45 x 128 biases by which routers choose, which are no parameters.
    "glm4_5v_106b": _file(62538297598, "107710933120 of zai-org/GLM-4.5V, counted in its files"),
    "glm4_6v_106b": _file(70957423560, "107710933120 of zai-org/GLM-4.6V, in a table of models"),
    "glm4_1v_9b": _file(70102877713, "the hub's figures of zai-org/GLM-4.6V-Flash, of the same class and shape"),
}  # fmt: skip
"""By preset."""
