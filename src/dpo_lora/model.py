"""The base model and its tokenizer: from the hub, a local folder, or the embedded package; quantised or not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from dpo_lora import embedded
from dpo_lora.choices import ModelSource, Quantization
from dpo_lora.device import Machine
from dpo_lora.errors import UserError
from dpo_lora.resources import missing_folder
from dpo_lora.schema import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """A loaded causal language model that nothing has changed yet."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # what people call it; for the card
    license: dict[str, Any]  # what the adapter's card repeats of it: license, license_name, license_link
    identity: dict[str, Any]  # how another machine gets the same weights

    @property
    def stop_ids(self) -> list[int]:
        """Token ids at which generation stops, as the model's own generation settings say."""
        return _stop_ids(self.model.generation_config)


_kept: dict[str, BaseModel] = {}


def keep(settings: ModelSettings, machine: Machine) -> None:
    """Load a model that processes forked from this one find loaded; they share its memory until they write to it."""
    _kept[_key(settings, machine)] = load(settings, machine)


def _key(settings: ModelSettings, machine: Machine) -> str:
    return f"{settings} {machine.device} {machine.dtype}"


def load(settings: ModelSettings, machine: Machine) -> BaseModel:
    """Load model and tokenizer onto ``machine``, or take over the model that was kept for it.

    Raises:
        UserError: there is no such model here, it is gated, it has no chat template, or
            bitsandbytes is asked for and missing.
    """
    base = _kept.pop(_key(settings, machine), None) or _load(settings, machine)
    log.info(
        "Base model %s: %s, %.0f M weights",
        settings.name,
        base.model.config.model_type,
        base.model.num_parameters() / 1e6,
    )
    return base


def _load(settings: ModelSettings, machine: Machine) -> BaseModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, published = _source(settings), settings.name
    identity: dict[str, Any] = {"name": settings.name, "revision": settings.revision}
    if settings.source is ModelSource.embedded:
        published = embedded.PUBLISHED_AS
        identity |= embedded.IDENTITY
    shared = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=machine.dtype,
            attn_implementation=settings.attention,
            device_map={"": machine.device} if machine.device.type == "cuda" else None,
            quantization_config=_quantization(settings.quantization, machine),
            **shared,
        )
    except OSError as error:
        raise UserError(_why_not(settings, error)) from error
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{settings.name} could not be loaded with model.attention={settings.attention}, "
            f"model.quantization={settings.quantization.value}, "
            f"model.trust_remote_code={settings.trust_remote_code}: {error}"
        ) from error
    _complete(tokenizer, settings)
    identity["commit"] = getattr(model.config, "_commit_hash", None)
    identity["weights"] = weights_fingerprint(model)
    return BaseModel(model, tokenizer, published, _license(settings, source), identity)


def load_tokenizer(settings: ModelSettings) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer as :func:`load` gives it, and the ids at which the model stops, without loading any weights.

    Raises:
        UserError: there is no such model here, or it has no chat template.
    """
    from transformers import AutoTokenizer, GenerationConfig

    source = _source(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(_why_not(settings, error)) from error
    _complete(tokenizer, settings)
    try:
        generation = GenerationConfig.from_pretrained(source, revision=settings.revision or "main")
    except OSError:  # many models have none, and then stop at the tokenizer's eos
        return tokenizer, []
    return tokenizer, _stop_ids(generation)


def _source(settings: ModelSettings) -> str:
    """The folder or hub id to load from; the embedded model is fetched and converted if need be."""
    if settings.source is not ModelSource.embedded:
        # A folder's full path: adapter_config.json keeps it, and whoever loads the adapter may be elsewhere.
        return str(Path(settings.name).absolute()) if Path(settings.name).is_dir() else settings.name
    if settings.name != embedded.NAME:
        raise UserError(
            f"model.name={settings.name}: the only embedded model is {embedded.NAME}. "
            f"For a hub id or a folder: model=hub model.name={settings.name}"
        )
    return str(embedded.ensure())


def _license(settings: ModelSettings, source: str) -> dict[str, Any]:
    """What the base model's own card states of its licence, in the hub's words; empty where it states none."""
    if settings.source is ModelSource.embedded:
        return {"license": embedded.LICENSE}
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    card = Path(source) / "README.md"
    if Path(source).is_dir() and not card.is_file():
        return {}
    try:
        stated = ModelCard.load(card if card.is_file() else source).data
    except (OSError, ValueError, EntryNotFoundError) as error:  # no network, no card, or front matter that is no YAML
        log.debug("The licence of %s could not be read: %s", settings.name, error)
        return {}
    # A licence that the hub has no id for is "other"; what it is called and where it stands are said beside that.
    found = {name: stated.get(name) for name in ("license", "license_name", "license_link") if stated.get(name)}
    link = found.get("license_link")
    if isinstance(link, str) and "://" not in link:  # a file beside that card, which does not lie beside the adapter's
        if card.is_file():
            del found["license_link"]
        else:
            found["license_link"] = f"https://huggingface.co/{source}/blob/{settings.revision or 'main'}/{link}"
    return found


def _complete(tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> None:
    """Require a chat template; pad with the end token where there is no other."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{settings.name} has no chat template, so conversations cannot be put to it. "
            "Use its instruction-tuned version, or add a chat_template to a local copy of its tokenizer."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _stop_ids(generation: Any) -> list[int]:
    ids = getattr(generation, "eos_token_id", None)
    return [] if ids is None else sorted(ids) if isinstance(ids, list) else [ids]


def weights_fingerprint(model: torch.nn.Module) -> str:
    """32 hex digits of the loaded weights' names, shapes, formats and bytes (XXH3, 128 bit).

    By content, because a folder can be edited in place; about 10 GB a second.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _quantization(wanted: Quantization, machine: Machine) -> object | None:
    if wanted is Quantization.none:
        return None
    try:
        import bitsandbytes  # noqa: F401  # transformers would report its absence in the middle of loading
    except ImportError as error:
        raise UserError(
            f"model.quantization={wanted.value} needs bitsandbytes: pip install 'dpo-lora[quantized]'."
        ) from error
    from transformers import BitsAndBytesConfig

    if wanted is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=machine.dtype,
    )


def _why_not(settings: ModelSettings, error: Exception) -> str:
    name, text = settings.name, str(error)
    if Path(name).is_dir():
        return f"The folder {name} could not be loaded as a model: {text}"
    if missing := missing_folder(name):
        return missing
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"{name} is gated and this machine may not read it. Accept its licence on its hub page and log in "
            "with 'hf auth login' (or set HF_TOKEN)."
        )
    return (
        f"{name} is not on this machine and could not be fetched from the hub: {text.splitlines()[0]}\n"
        "Check the id and the network; without one, use a local folder (model=hub model.name=FOLDER) "
        "or the embedded model (model=smollm2-135m)."
    )
