"""Tiny random models of many families, and a batch for each: what tests of layers and trainers run on."""

import torch
from torch import Tensor, nn

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, num_hidden_layers=layers, **SMALL))


def gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 31, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64}
    config = GPT2Config(bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM", **sizes)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers takes this from the name of the class, and logs that this one says nothing
    return model


def mixtral(layers: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=layers, **experts, **SMALL))


def vit(layers: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    config.problem_type = "single_label_classification"  # else the model sets it in its first forward pass
    return ViTForImageClassification(config)


FAMILIES = {"llama": llama, "gpt2": gpt2, "mixtral": mixtral, "vit": vit}


def family(name: str, seed: int = 0, layers: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[name](layers).eval()


def family_batch(name: str, seed: int = 0, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        images = torch.randn(size, 3, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(3, (size,), generator=generator)}
    ids = torch.randint(3, 31, (size, 9), generator=generator)
    return {"input_ids": ids, "labels": ids}
