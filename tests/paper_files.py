"""Tiny random files in the forms that the paper's users have: text encoders, autoencoders, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchforge.model.networks.build import build_network
from patchforge.model.networks.config import TextConfig

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "red", "apple", "a", "cat", "on", "mat")
WIDTH = 16
TEXT_SIZES = {
    "in_dim": 4,
    "depth": 2,
    "hidden_dim": 32,
    "head_dim": 16,
    "mapping_dim": 16,
    "mapping_depth": 1,
    "patch_size": 2,
    "txt_in_dim": WIDTH,
    "txt_refiner_dim": 16,
    "txt_refiner_head_dim": 8,
    "txt_refiner_depth": 1,
}
"""As in a checkpoint's config, which does not say the size of pictures."""
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 1, "head_dim": 8}


def write_tokenizer(folder: Path, side: str = "right") -> None:
    """A tokenizer of whole words, which puts `<s>` before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side=side)
    tokenizer.save_pretrained(folder)


def write_encoder(folder: Path, kind: str, *, whole: bool = False, shard_size: str = "5GB") -> Any:
    """Write a text encoder and its tokenizer. Returns the text network, as `transformers` makes it.

    `whole`: the weights are those of the larger model that the encoder is a part of, as they are published.
    """
    import transformers as t

    t.utils.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    vision = {key: _SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    vision |= {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
    clip = _SIZES | {"max_position_embeddings": 12}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    t5 = {"d_model": WIDTH, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": len(WORDS)}
    network: Any
    match kind:
        case "clip":
            network = t.CLIPModel(t.CLIPConfig(text_config=clip, vision_config=vision))
            text = network.text_model if whole else t.CLIPTextModel(t.CLIPTextConfig(**clip))
        case "siglip":
            network = t.SiglipModel(t.SiglipConfig(text_config=clip, vision_config=vision))
            text = network.text_model if whole else t.SiglipTextModel(t.SiglipTextConfig(**clip))
        case "t5":
            network = t.T5ForConditionalGeneration(t.T5Config(**t5))
            text = t.T5EncoderModel(t.T5Config(**t5))
            if whole:
                text.load_state_dict(network.state_dict(), strict=False)
        case "gemma":
            network = t.GemmaForCausalLM(t.GemmaConfig(**_GROUPED))
            text = network.model if whole else t.GemmaModel(t.GemmaConfig(**_GROUPED))
        case "qwen3_vl":
            eyes = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": WIDTH}
            eyes |= {"patch_size": 4, "deepstack_visual_indexes": [0]}
            config = t.Qwen3VLConfig(text_config=_GROUPED | rope, vision_config=eyes)
            network = t.Qwen3VLForConditionalGeneration(config)
            text = (
                network.model.language_model if whole else t.Qwen3VLTextModel(t.Qwen3VLTextConfig(**_GROUPED, **rope))
            )
    (network if whole else text).eval().save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder, "left" if kind in ("gemma", "qwen3_vl") else "right")
    return text.eval()


def write_autoencoder(folder: Path, kind: str, channels: int = 4) -> Any:
    """Write an autoencoder of `diffusers` with two pixels per latent, and return it."""
    import diffusers

    torch.manual_seed(0)
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": channels, "layers_per_block": 1}
    network: Any
    match kind:
        case "AutoencoderKL":
            network = diffusers.AutoencoderKL(**sizes, **stages)
        case "AutoencoderKLFlux2":
            network = diffusers.AutoencoderKLFlux2(**sizes, **stages)
            network.bn.running_mean = torch.randn(4 * channels)
            network.bn.running_var = torch.rand(4 * channels) + 0.5
        case "AutoencoderTiny":
            widths = {f"{coder}_block_out_channels": (8, 8) for coder in ("encoder", "decoder")}
            blocks = {f"num_{coder}_blocks": (1, 1) for coder in ("encoder", "decoder")}
            network = diffusers.AutoencoderTiny(latent_channels=channels, **widths, **blocks)
    network.eval().save_pretrained(folder)
    return network


def text_weights(**changes: int) -> dict[str, Tensor]:
    """Weights of a text-to-image network, under the names of the paper's code."""
    torch.manual_seed(0)
    network = build_network(TextConfig(**(TEXT_SIZES | changes), image_size=8))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            around = 4.0 if name.endswith("attn.scale") else 0.0
            parameter.copy_(around + 0.1 * torch.randn_like(parameter))
    return dict(network.state_dict())


def text_config(**params: Any) -> dict[str, Any]:
    """The config of such a network, as the paper's code writes it."""
    return {"target": "somewhere.PatchForcingTransformerT2I", "params": TEXT_SIZES | {"compile": True} | params}
