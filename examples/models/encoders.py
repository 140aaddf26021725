"""Small encoders with a loss, each with a batch: copy one, or plan and run it as it is.

Each function returns `(model, batch)`: the module in training mode, seeded, and the keyword arguments of its forward, whose output
carries the loss. Samples have unlike lengths; a masked language model's labels are -100 but for a few tokens of each sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "albert",
    "bert_classification",
    "bert_masked",
    "bert_question_answering",
    "big_bird",
    "convbert",
    "deberta",
    "deberta_v2",
    "deberta_v2_classification",
    "distilbert",
    "electra",
    "esm",
    "fnet",
    "funnel",
    "longformer",
    "longformer_global",
    "mobilebert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta_tagging",
    "roformer",
    "squeezebert",
    "xlm",
    "xlnet",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

# The sizes of these models, under the names that most configurations use.
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _masked(vocabulary: int = 128, *, samples: int = 4, sequence: int = 16, padding: int = 0) -> Batch:
    """Padded tokens, of which about a third, unevenly over the samples, are hidden (token 2) and to be predicted."""
    batch = _padded(vocabulary, samples=samples, sequence=sequence, padding=padding)
    generator = torch.Generator().manual_seed(2)
    share = torch.tensor([0.0, 0.2, 0.5, 0.7]).repeat(samples)[:samples, None]
    chosen = (torch.rand(samples, sequence, generator=generator) < share) & batch["attention_mask"].bool()
    return {**batch, "input_ids": torch.where(chosen, 2, batch["input_ids"]), "labels": batch["input_ids"].where(chosen, -100)}


def _padded(vocabulary: int = 128, *, samples: int = 4, sequence: int = 16, padding: int = 0) -> Batch:
    """Random tokens of unlike lengths and their mask."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocabulary, (samples, sequence), generator=generator)
    lengths = torch.randint(sequence // 2, sequence + 1, (samples, 1), generator=generator)
    real = torch.arange(sequence) < lengths
    return {"input_ids": tokens.where(real, padding), "attention_mask": real.long()}


def bert_masked() -> Example:
    """A masked language model with a tied head, and dropout."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**_SIZES)).train(), _masked()


def bert_classification() -> Example:
    """A class for each sequence, from the first token."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**_SIZES, **_NO_DROPOUT, num_labels=5))
    return model.train(), {**_padded(), "labels": torch.tensor([0, 3, 1, 4])}


def bert_question_answering() -> Example:
    """The first and last token of an answer: two classifications over positions; one answer lies outside."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**_SIZES, **_NO_DROPOUT))
    batch = _padded()
    types = (torch.arange(16) >= 6).long().expand(4, 16).contiguous()
    ends = {"start_positions": torch.tensor([7, 6, 16, 6]), "end_positions": torch.tensor([9, 6, 16, 7])}
    return model.train(), {**batch, "token_type_ids": types, **ends}


def roberta_tagging() -> Example:
    """A class for each token; positions counted from the tokens that are not padding."""
    from transformers import RobertaConfig, RobertaForTokenClassification

    torch.manual_seed(0)
    model = RobertaForTokenClassification(RobertaConfig(**_SIZES, **_NO_DROPOUT, pad_token_id=1, num_labels=7))
    batch = _masked(padding=1)
    return model.train(), {**batch, "labels": torch.where(batch["labels"] < 0, -100, batch["labels"] % 7)}


def albert() -> Example:
    """All layers share their parameters; a factored embedding."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    config = AlbertConfig(**_SIZES, **_NO_DROPOUT, embedding_size=16)
    return AlbertForMaskedLM(config).train(), _masked()


def electra() -> Example:
    """Tells replaced tokens from true ones: a binary loss over the tokens that the mask leaves, picked out by it."""
    from transformers import ElectraConfig, ElectraForPreTraining

    torch.manual_seed(0)
    model = ElectraForPreTraining(ElectraConfig(**_SIZES, **_NO_DROPOUT, embedding_size=16))
    batch = _padded()
    return model.train(), {**batch, "labels": batch["input_ids"] % 3 == 0}


def deberta() -> Example:
    """Content and position attend to each other."""
    from transformers import DebertaConfig, DebertaForMaskedLM

    torch.manual_seed(0)
    config = DebertaConfig(**_SIZES, **_NO_DROPOUT, relative_attention=True, max_relative_positions=16, pos_att_type=["c2p", "p2c"])
    return DebertaForMaskedLM(config).train(), _masked()


def deberta_v2() -> Example:
    """Relative positions in logarithmic buckets; a convolution beside the first layer; keys shared with the positions'."""
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    torch.manual_seed(0)
    config = DebertaV2Config(
        **_SIZES,
        **_NO_DROPOUT,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
    )
    return DebertaV2ForMaskedLM(config).train(), _masked()


def deberta_v2_classification() -> Example:
    """A class for each sequence; keys of positions apart."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    config = DebertaV2Config(**_SIZES, **_NO_DROPOUT, relative_attention=True, pos_att_type=["c2p", "p2c"], num_labels=3)
    return DebertaV2ForSequenceClassification(config).train(), {**_padded(), "labels": torch.tensor([0, 2, 1, 1])}


def distilbert() -> Example:
    """No token types and no pooler; dropout."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=128, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64)
    return DistilBertForMaskedLM(config).train(), _masked()


def mpnet() -> Example:
    """One relative bias shared by all layers."""
    from transformers import MPNetConfig, MPNetForMaskedLM

    torch.manual_seed(0)
    config = MPNetConfig(**_SIZES, **_NO_DROPOUT, pad_token_id=1)
    return MPNetForMaskedLM(config).train(), _masked(padding=1)


def xlm() -> Example:
    """Norms after each part; masks multiplied into the hidden states; embeddings of languages."""
    from transformers import XLMConfig, XLMWithLMHeadModel

    torch.manual_seed(0)
    config = XLMConfig(vocab_size=128, emb_dim=32, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0, n_langs=2, pad_index=0)
    batch = _masked()
    return XLMWithLMHeadModel(config).train(), {**batch, "langs": torch.tensor([0, 1, 1, 0])[:, None].expand(4, 16).contiguous()}


def esm() -> Example:
    """Proteins: 33 residues and signs, rotary positions, embeddings scaled by the share of masked tokens."""
    from transformers import EsmConfig, EsmForMaskedLM

    torch.manual_seed(0)
    sizes = _SIZES | {"vocab_size": 33}
    config = EsmConfig(**sizes, **_NO_DROPOUT, position_embedding_type="rotary", token_dropout=True, mask_token_id=2, pad_token_id=1)
    return EsmForMaskedLM(config).train(), _masked(33, padding=1)


def longformer() -> Example:
    """Sliding windows of 8 tokens."""
    from transformers import LongformerConfig, LongformerForMaskedLM

    torch.manual_seed(0)
    config = LongformerConfig(**_SIZES, **_NO_DROPOUT, attention_window=8, pad_token_id=1)
    return LongformerForMaskedLM(config).train(), _masked(sequence=32, padding=1)


def longformer_global() -> Example:
    """The first token attends to all, too: that code looks for such tokens, so each attention is one operator."""
    model, batch = longformer()
    first = torch.zeros_like(batch["attention_mask"])
    first[:, 0] = 1
    return model, {**batch, "global_attention_mask": first}


def big_bird() -> Example:
    """Blocks of 4 tokens that attend to neighbours, to the ends and to random blocks."""
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    torch.manual_seed(0)
    sizes = _SIZES | {"max_position_embeddings": 128}
    config = BigBirdConfig(**sizes, **_NO_DROPOUT, block_size=4, num_random_blocks=1, attention_type="block_sparse")
    return BigBirdForMaskedLM(config).train(), _masked(sequence=64)


def funnel() -> Example:
    """The sequence is halved by pooling and opened again; relative positions."""
    from transformers import FunnelConfig, FunnelForMaskedLM

    torch.manual_seed(0)
    config = FunnelConfig(
        vocab_size=128,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_std=0.02,
    )
    return FunnelForMaskedLM(config).train(), _masked()


def modernbert() -> Example:
    """Full attention every second layer, else a window; gated feed-forward; no biases."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    config = ModernBertConfig(
        **_SIZES,
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return ModernBertForMaskedLM(config).train(), _masked()


def nomic_bert() -> Example:
    """Rotary positions and a gated feed-forward in BERT."""
    from transformers import NomicBertConfig, NomicBertForMaskedLM

    torch.manual_seed(0)
    return NomicBertForMaskedLM(NomicBertConfig(**_SIZES)).train(), _masked()


def fnet() -> Example:
    """Fourier transforms instead of attention; no mask; dropout."""
    from transformers import FNetConfig, FNetForMaskedLM

    torch.manual_seed(0)
    sizes = {name: size for name, size in _SIZES.items() if name != "num_attention_heads"}
    batch = _masked()
    del batch["attention_mask"]
    return FNetForMaskedLM(FNetConfig(**sizes, hidden_dropout_prob=0.1)).train(), batch


def roformer() -> Example:
    """Rotary positions from a table that is a parameter without gradient."""
    from transformers import RoFormerConfig, RoFormerForMaskedLM

    torch.manual_seed(0)
    return RoFormerForMaskedLM(RoFormerConfig(**_SIZES, **_NO_DROPOUT)).train(), _masked()


def convbert() -> Example:
    """Half of the heads are convolutions whose kernels depend on the tokens."""
    from transformers import ConvBertConfig, ConvBertForMaskedLM

    torch.manual_seed(0)
    config = ConvBertConfig(**_SIZES, **_NO_DROPOUT, embedding_size=16, head_ratio=2, conv_kernel_size=5)
    return ConvBertForMaskedLM(config).train(), _masked()


def squeezebert() -> Example:
    """Grouped 1×1 convolutions instead of linear layers, channels first."""
    from transformers import SqueezeBertConfig, SqueezeBertForMaskedLM

    torch.manual_seed(0)
    config = SqueezeBertConfig(**_SIZES, **_NO_DROPOUT, embedding_size=32)
    return SqueezeBertForMaskedLM(config).train(), _masked()


def mobilebert() -> Example:
    """Narrow bottlenecks, several feed-forwards a layer, scale and shift instead of norms, embeddings of three tokens joined."""
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    torch.manual_seed(0)
    config = MobileBertConfig(**_SIZES, **_NO_DROPOUT, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2)
    return MobileBertForMaskedLM(config).train(), _masked()


def xlnet() -> Example:
    """Relative attention with a learned bias for content and for position, over all tokens; a class for each sequence."""
    from transformers import XLNetConfig, XLNetForSequenceClassification

    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0.0, summary_last_dropout=0.0, num_labels=3)
    return XLNetForSequenceClassification(config).train(), {**_padded(), "labels": torch.tensor([0, 2, 1, 1])}
